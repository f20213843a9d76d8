"""Prompt files and storyboards are read or refused with a message that helps; file names never collide."""

from __future__ import annotations

import json
import logging
import os
import re
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.errors import InputError
from utils.file_names import output_stems
from utils.files import partial_path
from utils.prompts import Storyboard, read_prompts, read_storyboards

PROMPTS = Path(__file__).parent.parent / "prompts"


def _file(tmp_path: Path, content: str | bytes) -> Path:
    path = tmp_path / "input.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_prompts_one_a_line(tmp_path: Path) -> None:
    path = _file(tmp_path, "a cat\r\n  ein Löwe \na\u2028b\nlast")
    assert read_prompts(path) == ["a cat", "ein Löwe", "a\u2028b", "last"]


def test_byte_order_mark_is_dropped(tmp_path: Path) -> None:
    assert read_prompts(_file(tmp_path, b"\xef\xbb\xbfa cat\n")) == ["a cat"]


def test_blank_lines_give_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert read_prompts(_file(tmp_path, "\na\n \t\nb\n\n")) == ["a", "b"]
    assert len(caplog.records) == 1
    assert "3 blank lines" in caplog.text


def test_final_newline_is_no_blank_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert read_prompts(_file(tmp_path, "a\nb\n")) == ["a", "b"]
    assert not caplog.records


@pytest.mark.parametrize("content", ["", "\n", " \n\t\r\n", "\ufeff\n"])
def test_no_prompt_is_an_error(tmp_path: Path, content: str) -> None:
    with pytest.raises(InputError, match=r"input\.txt: holds no prompts"):
        read_prompts(_file(tmp_path, content))


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.txt: there is no such file"):
        read_prompts(tmp_path / "nowhere.txt")
    with pytest.raises(InputError, match="is a folder"):
        read_prompts(tmp_path)


BOM, ZERO_WIDTH = "\ufeff", "\u200b\u2060\u00ad\u202a\u202c"


def test_invisible_characters_are_dropped(tmp_path: Path) -> None:
    path = _file(tmp_path, f"{BOM}a cat\n{BOM}a{ZERO_WIDTH} dog\nnul\0\x1b\n👩\u200d🚀 flies\nमैं\u200c\n")
    assert read_prompts(path) == ["a cat", "a dog", "nul", "👩\u200d🚀 flies", "मैं\u200c"]


@pytest.mark.parametrize(
    "line",
    [BOM, ZERO_WIDTH, "&nbsp;", " &nbsp;&#8203; ", "&amp;nbsp;", "\u00a0", "\u3000", "\u3164", "\u2800", "\ufe0f"],
)
def test_lines_on_which_nothing_can_be_seen_are_blank(
    tmp_path: Path, line: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert read_prompts(_file(tmp_path, f"a cat\n{line}\nTom &amp; Jerry\n")) == ["a cat", "Tom &amp; Jerry"]
    assert "skipped 1 blank line" in caplog.text
    with pytest.raises(InputError, match="holds no prompts"):
        read_prompts(_file(tmp_path, line))
    board = json.dumps({"prompts": ["a", line]})
    with pytest.raises(InputError, match=r"prompts\[1\] must be a text that is not blank"):
        read_storyboards(_file(tmp_path, board))


@pytest.mark.parametrize("suffix", [".json", ".JSON", ".jsonl", ".Yaml", ".yml", ".csv", ".TSV", ".xml", ".parquet"])
def test_structured_files_are_no_lists_of_prompts(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"prompts{suffix}"
    path.write_text("a cat\n")
    with pytest.raises(
        InputError, match=rf"data_path: .*prompts\{suffix}: is a \{suffix.lower()} file.*one prompt a line"
    ):
        read_prompts(path, "data_path")


@pytest.mark.parametrize(
    "content",
    [
        '[\n    {\n        "prompt_en": "a red fox"\n    }\n]\n',
        '["a red fox", "a blue bird"]',
        '{"prompts": ["a", "b"]}\n{"prompts": ["c", "d"]}\n',
    ],
)
def test_json_under_another_name_is_no_list_of_prompts(tmp_path: Path, content: str) -> None:
    with pytest.raises(InputError, match=r"input\.txt: is JSON, whose lines are no prompts\. .* ends in \.jsonl"):
        read_prompts(_file(tmp_path, content))


def test_brackets_alone_do_not_make_json(tmp_path: Path) -> None:
    lines = ["[cinematic] a red fox", "{wide shot} a bird", "3", '"quoted"', "null"]
    assert read_prompts(_file(tmp_path, "\n".join(lines))) == lines


def test_storyboards_of_data_sets(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = {"id": 7, "prompts": ["a", "b", "c"], "switch_frame_indices": ["3", 6], "split": "test"}
    path = _file(tmp_path, "\n".join(json.dumps(line) for line in (first, {**first, "switch_frame_indices": "3, 6"})))
    assert read_storyboards(path) == [Storyboard(("a", "b", "c"), (3, 6))] * 2
    (record,) = caplog.records
    assert record.getMessage().endswith(
        "keys without a use here are ignored: id, split. Known: prompts, switch_frame_indices, scene_cuts"
    )


def test_not_utf8_names_the_place(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"byte 0xe9 at offset 9 \(line 2\)"):
        read_prompts(_file(tmp_path, b"first\ncaf\xe9\n"))


def test_storyboards(tmp_path: Path) -> None:
    first = {"prompts": [" a ", "b\u2028c"], "switch_frame_indices": [40]}
    path = _file(tmp_path, f'{json.dumps(first, ensure_ascii=False)}\n\n{{"prompts": ["x"]}}\n')
    assert read_storyboards(path) == [Storyboard(("a", "b\u2028c"), (40,)), Storyboard(("x",), None)]


def test_lines_of_one_prompt_do_not_grow_together(tmp_path: Path) -> None:
    board = _file(tmp_path, json.dumps({"prompts": ["A red\nball\r\nmoves.\n"]}))
    assert read_storyboards(board)[0].prompts == ("A red ball moves.",)
    assert read_prompts(_file(tmp_path, "A red\fball\n")) == ["A red ball"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{'prompts': []}", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ('["a"]', "is a JSON list, not an object"),
        ("{}", "prompts must be a list"),
        ('{"prompts": []}', "prompts must be a list of at least one"),
        ('{"prompts": "a"}', "prompts must be a list"),
        ('{"prompts": ["a", 3]}', r"prompts\[1\] must be a text"),
        ('{"prompts": ["  "]}', r"prompts\[0\] must be a text that is not blank"),
        ('{"prompts": ["\\ud800"]}', r"prompts\[0\] holds half a character"),
        ('{"promts": ["a"]}', "unknown key 'promts'. Did you mean prompts?"),
        ('{"prompts": ["a", "b"], "switch_frame_indices": [1, 2]}', "2 prompts need 1 switch_frame_indices, not 2"),
        ('{"prompts": ["a", "b"], "switch_frame_indices": [0]}', "ascending whole numbers"),
        ('{"prompts": ["a", "b"], "switch_frame_indices": [true]}', "expected latent frames such as 40"),
        ('{"prompts": ["a", "b"], "switch_frame_indices": [1.5]}', "expected latent frames such as 40"),
        ('{"prompts": ["a", "b", "c"], "switch_frame_indices": [9, 9]}', "ascending whole numbers"),
        ('{"prompts": ["a", "b"], "switch_frame_indices": {"a": 1}}', "expected latent frames such as 40"),
        ('{"prompts": ["a", "b"], "switch_frame_indices": "40;80"}', "expected latent frames such as 40"),
        ('{"prompts": ["a", "b"], "switch_frame_indices": ["9999999999"]}', "expected latent frames such as 40"),
    ],
)
def test_bad_storyboard_names_file_and_line(tmp_path: Path, line: str, message: str) -> None:
    path = _file(tmp_path, f'{{"prompts": ["fine"]}}\n{line}\n')
    with pytest.raises(InputError, match=rf"input\.txt, line 2: .*{message}"):
        read_storyboards(path)


def test_shipped_prompts() -> None:
    prompts = read_prompts(PROMPTS / "example_prompts.txt")
    assert len(prompts) == 10
    assert all(40 <= len(prompt.split()) <= 90 for prompt in prompts)
    boards = read_storyboards(PROMPTS / "interactive_example.jsonl")
    assert len(boards) >= 6
    assert all(len(board.prompts) == 6 for board in boards)
    assert all(30 <= len(prompt.split()) <= 70 for board in boards for prompt in board.prompts)


def test_index_names() -> None:
    prompts = ["A cat, running!", "", "///", "Été à la plage", "x" * 300, "A cat, running!"]
    assert output_stems(prompts, with_index=True) == [
        "000-a-cat-running",
        "001",
        "002",
        "003-été-à-la-plage",
        f"004-{'x' * 40}",
        "005-a-cat-running",
    ]


def test_plain_prompts_keep_their_names() -> None:
    prompts = ["a person is clapping", "a car's 3 wheels, moving (fast)", "雪の中の猫", "🐱 cat", "x" * 100]
    assert output_stems(prompts, with_index=False) == prompts


def test_duplicates_are_numbered_in_order() -> None:
    assert output_stems(["a", "b", "a", "a", "b"], with_index=False) == ["a", "b", "a-2", "a-3", "b-2"]
    assert output_stems(["a", "a", "a-2"], with_index=False) == ["a", "a-3", "a-2"]


def test_names_do_not_depend_on_the_order_of_prompts_that_differ_in_case() -> None:
    one, two = output_stems(["A cat", "a cat"], with_index=False)
    assert re.fullmatch(r"A cat-[0-9a-f]{8}", one)
    assert re.fullmatch(r"a cat-[0-9a-f]{8}", two)
    assert output_stems(["a cat", "A cat"], with_index=False) == [two, one]


def test_a_prompt_may_spell_out_the_name_of_another() -> None:
    made = output_stems(["a/b"], with_index=False)[0]
    stems = output_stems([made, "a/b", "a/b"], with_index=False)
    assert stems[0] == made
    assert len(set(stems)) == 3


@pytest.mark.parametrize(
    "prompt",
    [
        *("a/b", "..", ".", "", " ", ".hidden", "-rf", "a\nb", "a\0b", 'a<>:"\\|?*b', "end.", "end ", "a\u202eb"),
        *("CON", "nul.txt", "Com1 .x", "lpt³", "\ud800", "x" * 101, "雪" * 61, "🐱" * 46, "e\u0301" * 200),
    ],
)
def test_changed_names_are_legal_and_carry_a_digest(prompt: str, tmp_path: Path) -> None:
    stem = output_stems([prompt], with_index=False)[0]
    assert re.search(r"-[0-9a-f]{8}$", stem)
    _assert_legal(stem)
    (tmp_path / f"{stem}-24.mp4.json").write_text("x")
    assert os.listdir(tmp_path) == [f"{stem}-24.mp4.json"]


def test_names_differ_where_only_the_cut_end_does() -> None:
    prompts = [f"{'x' * 300}{end}" for end in "abc"]
    assert len(set(output_stems(prompts, with_index=False))) == 3


def _assert_legal(stem: str) -> None:
    assert stem
    assert len(stem) <= 100
    assert len(stem.encode()) <= 180  # also: no lone surrogate
    assert stem[0] not in ".- "
    assert stem[-1] not in ". "
    assert not set(stem) & set('<>:"/\\|?*')
    assert all(unicodedata.category(char) not in ("Cc", "Cs") for char in stem)
    base = stem.split(".")[0].strip().lower()
    assert base not in {"con", "prn", "aux", "nul"} | {f"{port}{n}" for port in ("com", "lpt") for n in range(10)}
    for name in (f"{stem}-24.mp4", f"{stem}-24.mp4.json"):
        assert len(partial_path(Path(name)).name.encode()) < 255


nasty = st.sampled_from(
    ["a", "A", "a-2", "-2", "con", "NUL", "/", "..", ".", " ", "é", "e\u0301", "ß", "ss", "İ", "\u0345"]
)
prompts_of_any_kind = st.lists(
    st.one_of(
        st.text(st.characters(), max_size=8),
        st.lists(nasty, max_size=4).map("".join),
        st.builds(lambda piece, times: piece * times, nasty, st.integers(90, 310)),
    ),
    max_size=12,
)


@settings(max_examples=300, deadline=None)
@given(prompts_of_any_kind, st.booleans())
def test_any_prompts_get_legal_different_names(prompts: list[str], with_index: bool) -> None:
    # The second half: prompts that spell out the names made for the first.
    for texts in (prompts, prompts + output_stems(prompts, with_index)):
        stems = output_stems(texts, with_index)
        assert stems == output_stems(texts, with_index)
        assert len(stems) == len(texts)
        folded = {unicodedata.normalize("NFC", unicodedata.normalize("NFC", stem).casefold()) for stem in stems}
        assert len(folded) == len(stems)
        assert len({unicodedata.normalize("NFD", stem).upper() for stem in stems}) == len(stems)
        for stem in stems:
            _assert_legal(stem)
