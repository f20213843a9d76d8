#!/usr/bin/env bash
# All that belongs to new weights of the small model, made anew; over an hour of two cores that do nothing else:
#
#     benchmarks/shapes.sh FOLDER [--only PATTERN]
#
# First their calibration, then figures, plots and pictures, and last the tables of the documents. Sentences that quote a
# figure, the bounds of shapes/gate.json, the claims in tests/test_frontier.py and pictures of the studio are left to
# whoever reads the tables.
# --only runs the parts whose names match a regular expression: what is missing after a part has failed.
# PYTHON is the interpreter, .venv/bin/python by default.
set -euo pipefail
cd "$(dirname "$0")/.."

if [ $# -eq 3 ] && [ "$2" = --only ]; then
    ONLY=$3
elif [ $# -eq 1 ] && [ "${1#--}" = "$1" ]; then
    ONLY=.
else
    sed -n '2,10s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
PYTHON=${PYTHON:-.venv/bin/python}
mkdir -p "$1"
FOLDER=$(cd "$1" && pwd)
SHIPPED=checkpoints/shapes
DEMO=configs/shapes_demo.yaml
VIDEOS=(--captions 64 --storyboards 128 --ten 4 --long 8) # that are evaluated

keep() { # FILE NAME: a result, without the folder that it was written to
    sed "s#$FOLDER[a-z_/]*#FOLDER#g" "$1" >"$FOLDER/kept.json"
    mv "$FOLDER/kept.json" "benchmarks/results/$2.json"
}

calibration() {
    rm -f $SHIPPED/calibration.safetensors
    $PYTHON -m pipeline.calibrate --config_path $DEMO --prompts prompts/shapes_training.txt --videos 8 \
        --out $SHIPPED/calibration.safetensors seed=1
    $PYTHON -m pipeline.calibrate --curve $SHIPPED/calibration.safetensors --plot docs/shapes/calibrated
}

evaluation() {
    local policies=full,window,prune,packed,anchored,calibrated:1.33,calibrated:2,calibrated:4,full@bf16,full@fp8
    $PYTHON -m shapes.evaluate --policies $policies "${VIDEOS[@]}" --out "$FOLDER/evaluation"
    keep "$FOLDER/evaluation/report.json" shapes
    $PYTHON -m shapes.report benchmarks/results/shapes.json docs/shapes/policies.svg
}

truth() {
    $PYTHON -m shapes.evaluate --policies truth "${VIDEOS[@]}" --out "$FOLDER/truth"
    keep "$FOLDER/truth/report.json" shapes_truth
}

frontier() {
    $PYTHON -m shapes.frontier --captions 20 --out "$FOLDER/frontier"
    keep "$FOLDER/frontier/frontier.json" frontier
    cp "$FOLDER"/frontier/frontier.{png,svg} docs/shapes
}

frontier_calibrated() {
    local points='full,paper,window 7,calibrated 1.33,calibrated 2,calibrated 4,online 1.33,online 2,online 4'
    OMP_NUM_THREADS=1 $PYTHON -m shapes.frontier --threads 1 --batch 1 --captions 12 --points "$points" \
        --out "$FOLDER/frontier_calibrated"
    keep "$FOLDER/frontier_calibrated/frontier.json" frontier_calibrated
    cp "$FOLDER"/frontier_calibrated/frontier.{png,svg} docs/shapes/calibrated
}

comparison() {
    $PYTHON -m benchmarks.compare configs/shapes_calibrated.yaml --policies full,packed,calibrated:1.33,window:7 \
        --videos 6 --out "$FOLDER/comparison" dummy_forcing.num_dummy=0.5
    keep "$FOLDER/comparison/comparison.json" compare_shapes
}

atlas() {
    $PYTHON -m pipeline.atlas --config_path $DEMO num_samples=4 --query_share 1 --out $SHIPPED/atlas.safetensors \
        --plot docs/shapes/atlas
    $PYTHON -m pipeline.atlas --config_path $DEMO num_samples=4 --sampling benchmarks/results/sampling.json
}

pictures() {
    make demo
    cp demo/shapes_interactive/000*.png docs/shapes/demo.png
    $PYTHON -m shapes.demo_picture demo/shapes/00[124]*.mp4 demo/shapes_interactive/*.mp4 --out docs/demo.webp
}

tables() {
    $PYTHON -m benchmarks.tables
}

for part in calibration evaluation truth frontier frontier_calibrated comparison atlas pictures tables; do
    if [[ $part =~ $ONLY ]]; then
        printf '== %s %s\n' "$(date +%H:%M:%S)" $part
        $part
    fi
done
