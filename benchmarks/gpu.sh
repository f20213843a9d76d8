#!/usr/bin/env bash
# Everything worth knowing about the program on one GPU, in one call of under 9 minutes:
#
#     benchmarks/gpu.sh FOLDER [--only PATTERN] [--device cpu --small]
#
# Correctness first, all of it at once (the stored vectors in fp32 and bf16 with each engine, the tests marked gpu, the
# small model's videos), then the tables, each alone. Every part has its own time limit and its own files in FOLDER, so
# that one that fails costs nothing else; FOLDER/summary.txt has a line for each. --only runs the parts whose names match
# a regular expression, --small takes minutes of a CPU instead: fewer cases, tiny models, the same parts.
# PYTHON is the interpreter, python3 by default, and LIMIT the seconds for everything, 530 by default.
set -u
cd "$(dirname "$0")/.." || exit 2

if [ $# -lt 1 ] || [ "${1#--}" != "$1" ]; then
    sed -n '2,11s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
FOLDER=$1
shift
DEVICE=cuda
SMALL=no
ONLY=.
while [ $# -gt 0 ]; do
    case $1 in
    --device) DEVICE=$2 && shift 2 ;;
    --only) ONLY=$2 && shift 2 ;;
    --small) SMALL=yes && shift ;;
    *) echo "gpu.sh: $1 is unknown" >&2 && exit 2 ;;
    esac
done
PYTHON=${PYTHON:-python3}
LIMIT=${LIMIT:-530}
mkdir -p "$FOLDER" || exit 2
FOLDER=$(cd "$FOLDER" && pwd)
# What one part compiles, the next finds.
export TORCHINDUCTOR_CACHE_DIR="${TORCHINDUCTOR_CACHE_DIR:-$FOLDER/compile_cache}"
: >"$FOLDER/summary.txt"

# part NAME SECONDS COMMAND...: run it for at most so long, output to NAME.txt
part() {
    local name=$1 limit=$2 left=$((LIMIT - SECONDS)) begin=$SECONDS status
    shift 2
    [[ $name =~ $ONLY ]] || return
    [ "$left" -lt "$limit" ] && limit=$left
    if [ "$limit" -le 5 ]; then
        status="left out, no time"
    else
        timeout -k 5 "$limit" "$@" >"$FOLDER/$name.txt" 2>&1
        case $? in
        0) status="ok" ;;
        124 | 137) status="out of time" ;;
        *) status="FAILED" ;;
        esac
    fi
    printf '%-24s %4d s  %s\n' "$name" "$((SECONDS - begin))" "$status" | tee -a "$FOLDER/summary.txt"
}

vectors() { # NAME ENGINE PRECISION SECONDS CASES...
    local name=$1 engine=$2 precision=$3 limit=$4
    shift 4
    part "$name" "$limit" "$PYTHON" -m tests.conformance "$@" --device "$DEVICE" --engine "$engine" --precision "$precision"
}

dit() { # NAME SECONDS ARGUMENTS...
    local name=$1 limit=$2
    shift 2
    part "$name" "$limit" "$PYTHON" -m benchmarks.dit --device "$DEVICE" --json "$FOLDER/$name.json" "$@"
}

program() { # NAME SECONDS SCRIPT CONFIG ARGUMENTS...: a video of the small model as its users make it
    local name=$1 limit=$2 script=$3 config=$4
    shift 4
    part "$name" "$limit" "$PYTHON" "$script" --config_path "configs/$config.yaml" device="$DEVICE" \
        output_folder="$FOLDER/$name" "$@"
}

training() { # NAME SECONDS ARGUMENTS...: every phase of the small model's training in a few steps
    local name=$1 limit=$2 train='"$0" -m shapes.train'
    shift 2
    part "$name" "$limit" bash -c "$train text --work \"\$1\" --steps 4 && $train dit --no-compile --work \"\$@\"" \
        "$PYTHON" "$FOLDER/$name" "$@"
}

DATA=tests/data/vectors
ALL=()
OTHERS=()
for case in "$DATA"/*.safetensors; do
    case $case in
    *_a.safetensors) ;;
    */text_encoder.* | */vae.*) OTHERS+=("$case") ;;
    *) ALL+=("$case") ;;
    esac
done
FEW=("$DATA/packed_start1.safetensors" "$DATA/storyboard_window.safetensors")

part machine 30 bash -c 'nvidia-smi || true; '"$PYTHON"' -m torch.utils.collect_env'
if [ "$SMALL" = yes ]; then
    vectors vectors_eager_fp32 eager fp32 60 "${FEW[@]}"
    vectors vectors_eager_bf16 eager bf16 60 "${FEW[@]}"
    vectors vectors_compiled_fp32 compiled fp32 120 "${FEW[0]}"
    training training 100 --steps 8 --batch 2
    part tests_gpu 60 "$PYTHON" -m pytest -m gpu -q tests/test_gpu.py tests/test_attention.py tests/test_fp8.py
    dit tiny 120 --resolution tiny --dim 64 --layers 1 --policy full,packed,calibrated --engine eager,compiled --repeat 1 --profile
    TINY=(--device "$DEVICE" --resolution tiny --width 8 --repeat 1)
    part merged 60 "$PYTHON" -m benchmarks.merged --device "$DEVICE" --resolution tiny --dim 64 --layers 1 --repeat 1
    part vae 60 "$PYTHON" -m benchmarks.vae "${TINY[@]}" --json "$FOLDER/vae.json"
    part end_to_end 60 "$PYTHON" -m benchmarks.end_to_end "${TINY[@]}" --dim 64 --layers 1 --engine eager \
        --json "$FOLDER/end_to_end.json"
else
    vectors vectors_eager_fp32 eager fp32 100 "${ALL[@]}" &
    vectors vectors_others_fp32 eager fp32 100 "${OTHERS[@]}" &
    vectors vectors_recorded_fp32 recorded fp32 100 "${ALL[@]}" &
    vectors vectors_recorded_bf16 recorded bf16 100 "${ALL[@]}" &
    vectors vectors_graphed_fp32 graphed fp32 100 "${FEW[@]}" &
    vectors vectors_graphed_bf16 graphed bf16 100 "${FEW[@]}" &
    part tests_gpu 100 "$PYTHON" -m pytest -m gpu -q tests/test_gpu.py tests/test_attention.py tests/test_fp8.py &
    program program_demo 100 inference.py shapes_demo inference_iter=2 profile=true &
    program program_online 100 inference.py shapes_calibrated dummy_forcing.calibration=online &
    program program_storyboard 100 interactive_inference.py shapes_interactive inference_iter=1 engine=eager &
    training training 100 --steps 60 &
    wait
    dit dit_480 150 --resolution 480 --engine graphed,compiled,eager --policy packed,full,window,prune --profile
    part vae 60 "$PYTHON" -m benchmarks.vae --resolution 480 --engine graphed --frames 9 --repeat 3 --json "$FOLDER/vae.json"
    CLIPS=(-m benchmarks.end_to_end --resolution 480 --engine graphed --no_file)
    part end_to_end 120 "$PYTHON" "${CLIPS[@]}" --policy packed,observed,online --profile --json "$FOLDER/end_to_end.json"
    # The plan lets a clip of 480 rows take the fast way on a card of 16 GB, less the reserve.
    part end_to_end_16 60 "$PYTHON" "${CLIPS[@]}" --memory 14.4 --repeat 1 --json "$FOLDER/end_to_end_16.json"
    dit dit_fp8_480 60 --resolution 480 --engine graphed --policy packed --precision auto,fp8 --repeat 3 --profile
    dit dit_attention_480 60 --resolution 480 --engine graphed --policy packed,full --attention sdpa,cudnn,fa2,fa3,varlen --repeat 3
    dit dit_calibrated_480 50 --resolution 480 --engine graphed,eager --policy packed,calibrated --attention auto,varlen \
        --repeat 3 --profile
    dit dit_720 90 --resolution 720 --engine graphed --policy packed,full --repeat 3 --profile
    dit dit_1080 100 --resolution 1080 --engine graphed --policy packed,full --repeat 3 --profile
    part vae_1080 60 "$PYTHON" -m benchmarks.vae --resolution 720,1080 --engine graphed --frames 9 --repeat 3 \
        --json "$FOLDER/vae_1080.json"
    part merged 40 "$PYTHON" -m benchmarks.merged --device "$DEVICE" --json "$FOLDER/merged.json"
    if "$PYTHON" -c 'import sys, torch; sys.exit(torch.cuda.device_count() < 2)'; then
        TOGETHER=("$PYTHON" -m torch.distributed.run --standalone --nproc_per_node=2 -m tests.conformance)
        part two_gpus_vectors 60 "${TOGETHER[@]}" "${ALL[@]}" --device cuda --engine eager --precision fp32
        part two_gpus_compiled 90 "${TOGETHER[@]}" "${FEW[@]}" --device cuda --engine compiled --precision bf16
        part two_gpus_scale 90 "$PYTHON" -m benchmarks.scale --ranks 1,2 --layers 30 --json "$FOLDER/scale.json"
    fi
    part vae_search 60 "$PYTHON" -m benchmarks.vae --resolution 480 --engine graphed --repeat 3 --search \
        --json "$FOLDER/vae_search.json"
fi
grep -q FAILED "$FOLDER/summary.txt" && exit 1
exit 0
