"""Files, overrides and the strict building of dataclasses, on dataclasses made up here."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from utils.config import build, text_override
from utils.errors import InputError
from utils.settings_file import load_mapping


def write(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@dataclasses.dataclass(frozen=True)
class Inner:
    count: int = 1
    share: float = 0.5


@dataclasses.dataclass(frozen=True)
class Outer:
    name: str
    flag: bool = False
    mode: Literal["fast", "slow"] = "fast"
    level: Literal[1, 2] = 1
    inner: Inner = dataclasses.field(default_factory=Inner)
    maybe: Inner | None = None
    pair: tuple[int, float] = (1, 2.0)
    many: tuple[int, ...] = ()
    items: list[str] = dataclasses.field(default_factory=list)
    size: int | tuple[int, int] = 1
    limit: float | None = None


def test_build_makes_nested_values_of_the_annotated_types() -> None:
    given_values = {
        "name": "x",
        "inner": {"share": 1},
        "maybe": {"count": 3},
        "pair": [4, 5],
        "many": [1, 2, 3],
        "items": ["a"],
        "size": [2, 3],
        "limit": 2,
    }
    built = build(Outer, given_values)
    assert built == Outer("x", False, "fast", 1, Inner(1, 1.0), Inner(3), (4, 5.0), (1, 2, 3), ["a"], (2, 3), 2.0)
    assert isinstance(built.inner.share, float)
    assert isinstance(built.limit, float)
    assert build(Outer, {"name": "x", "maybe": None}).maybe is None


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"inner": {"count": True}}, "outer.inner.count: expected an integer, got true"),
        ({"inner": {"count": "3"}}, "outer.inner.count: expected an integer, got the text '3'"),
        ({"inner": {"count": 3.0}}, "outer.inner.count: expected an integer, got 3.0 (float)"),
        ({"inner": {"count": None}}, "outer.inner.count: expected an integer, got null"),
        ({"inner": {"share": float("nan")}}, "outer.inner.share: expected a number, got nan (float)"),
        ({"inner": {"share": True}}, "outer.inner.share: expected a number, got true"),
        ({"inner": 3}, "outer.inner: expected a section with the keys count, share, got 3 (int)"),
        ({"inner": None}, "outer.inner: expected a section with the keys count, share, got null"),
        ({"maybe": {"count": "x"}}, "outer.maybe.count: expected an integer, got the text 'x'"),
        ({"name": 3}, "outer.name: expected text, got 3 (int)"),
        ({"flag": 1}, "outer.flag: expected true or false, got 1 (int)"),
        ({"mode": "fats"}, "outer.mode: expected one of fast, slow, got the text 'fats'; did you mean fast?"),
        ({"level": True}, "outer.level: expected one of 1, 2, got true"),
        ({"pair": [1]}, "outer.pair: expected a list of 2 integers, got [1] (list)"),
        ({"pair": ["a", 2]}, "outer.pair[0]: expected an integer, got the text 'a'"),
        ({"many": 1}, "outer.many: expected a list of integers, got 1 (int)"),
        ({"many": [1, "b"]}, "outer.many[1]: expected an integer, got the text 'b'"),
        ({"items": [1]}, "outer.items[0]: expected text, got 1 (int)"),
        ({"size": "480"}, "outer.size: expected an integer or a list of 2 integers, got the text '480'"),
        ({"size": [1, "x"]}, "outer.size[1]: expected an integer, got the text 'x'"),
        ({"limit": "much"}, "outer.limit: expected a number or null, got the text 'much'"),
        ({"flga": True}, "outer.flga: unknown key; did you mean outer.flag?"),
        ({"share": 0.1}, "outer.share: unknown key; did you mean outer.inner.share?"),
        ({"inner": {"flag": True}}, "outer.inner.flag: unknown key; did you mean outer.flag?"),
        ({"inner": {"zzz": 1}}, "outer.inner.zzz: unknown key; known here: count, share"),
    ],
)
def test_build_names_field_value_and_expected_type(values: dict[str, object], expected: str) -> None:
    with pytest.raises(InputError) as caught:
        build(Outer, {"name": "x", **values}, "outer")
    assert str(caught.value) == expected


def test_build_says_which_value_is_missing() -> None:
    with pytest.raises(InputError, match=r"^name: missing, expected text$"):
        build(Outer, {})


@given(st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.lists(st.integers())))
def test_an_integer_field_takes_integers_and_nothing_else(value: object) -> None:
    if type(value) is int and value.bit_length() <= 64:
        assert build(Inner, {"count": value}).count == value
    else:
        with pytest.raises(InputError, match="count: expected an integer"):
            build(Inner, {"count": value})


def test_overrides_are_typed_as_yaml_and_merged_before_interpolation(tmp_path: Path) -> None:
    path = write(tmp_path, "seed: 1\ncopy: ${seed}\nsection:\n  a: 1\n  b: [1, 2]\n")
    merged = load_mapping(path, ["seed=2", "section.b=[3]", "section.c=null", "text='4'", "on=true"])
    assert merged == {"seed": 2, "copy": 2, "section": {"a": 1, "b": [3], "c": None}, "text": "4", "on": True}


def test_a_byte_order_mark_and_an_empty_file_are_read(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(b"\xef\xbb\xbfseed: 3\n")
    assert load_mapping(path, []) == {"seed": 3}
    assert load_mapping(write(tmp_path, "# nothing\n"), ["seed=4"]) == {"seed": 4}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("- 1\n- 2\n", "top level must be a mapping of `key: value` lines, found a sequence"),
        ("word\n", "top level must be a mapping of `key: value` lines, found a scalar"),
        ("seed: 1\nlist: [1,\n", "not valid YAML, line 3, column 1"),
        ("seed: 1\nseed: 2\n", "not valid YAML, line 2, column 1: found duplicate key seed"),
        ("seed: !!python/object:os.system x\n", "not valid YAML, line 1"),
        ("seed: ${nowhere}\n", "Interpolation key 'nowhere' not found (key seed)"),
        ("seed: ???\n", "Missing mandatory value: seed"),
    ],
)
def test_unusable_files_are_refused_with_their_name(tmp_path: Path, text: str, expected: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(InputError) as caught:
        load_mapping(path, [])
    assert str(caught.value).startswith(f"{path}: ")
    assert expected in str(caught.value)


def test_missing_and_binary_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent\.yaml: no such configuration file"):
        load_mapping(tmp_path / "absent.yaml", [])
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=r"binary\.yaml: is not UTF-8 text: byte 0xff at offset 0 \(line 1\)"):
        load_mapping(tmp_path / "binary.yaml", [])
    with pytest.raises(InputError, match="is a folder, not a configuration file"):
        load_mapping(tmp_path, [])


@pytest.mark.parametrize("override", ["seed", "=3", "a..b=1", "seed={", "seed=???"])
def test_malformed_overrides_are_refused(tmp_path: Path, override: str) -> None:
    with pytest.raises(InputError, match=r"expected key=value|not valid YAML|Missing mandatory value"):
        load_mapping(write(tmp_path, "seed: 1"), [override])


def test_all_unknown_keys_are_named_at_once() -> None:
    values = {"name": "x", "flga": True, "zzz": 1, "inner": {"cuont": 2, "qqq": 3}, "maybe": {"share": 1.0}}
    with pytest.raises(InputError) as caught:
        build(Outer, values)
    assert str(caught.value) == (
        "4 unknown keys: flga (did you mean flag?), zzz, inner.cuont (did you mean inner.count?), inner.qqq; "
        "correct or remove them"
    )


def test_pythons_none_is_null_where_null_may_be() -> None:
    assert build(Outer, {"name": "None", "maybe": "None", "limit": "none"}) == Outer("None", maybe=None, limit=None)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"inner": {"count": 1 << 20_000}}, "inner.count: expected an integer, got a number of 6021 digits"),
        ({"limit": 10**400}, "limit: expected a number or null, got a number of 401 digits"),
        ({"inner": {"count": "x" * 5000}}, f"expected an integer, got the text '{'x' * 100}'... (5000 characters)"),
        ({"many": ["x"] * 5000}, "many[0]: expected an integer, got the text 'x'"),
        ({"inner": {"count": ["x" * 5000] * 5000}}, "'... (5000 characters), ...] (list)"),
        ({"flag": {"\x1b[31m": "\x00"}}, r"expected true or false, got a section {'\x1b[31m': '\x00'}"),
        ({"x" * 5000: 1}, f"'{'x' * 100}'... (5000 characters): unknown key; known here: name"),
        ({"\x1b[31m": 1}, r"'\x1b[31m': unknown key"),
    ],
)
def test_messages_stay_short_and_printable(values: dict[str, object], expected: str) -> None:
    with pytest.raises(InputError) as caught:
        build(Outer, {"name": "x", **values})
    message = str(caught.value)
    assert expected in message and message.isprintable() and len(message) < 2500


def test_any_message_is_printable_and_bounded() -> None:
    message = str(
        InputError(f"output_folder: /a/\x1b[2J\u202e{'x' * 5000}/\ufeffb\nline two: {'word ' * 5000}\ud800 end")
    )
    first, second = message.split("\n")
    assert first.startswith(r"output_folder: /a/\x1b[2J\u202exxx") and first.endswith(r"/\ufeffb") and len(first) < 500
    assert second.startswith("line two: word ") and second.endswith(r"\ud800 end") and len(second) < 3100


@pytest.mark.parametrize(
    "override",
    [
        *("many.0=5", "many.x=5", "many[0]=5", "many={}", "inner=[]", "many.0.x=1"),
        *(
            f"name={'9' * 5000}",
            f"name={'[' * 3000}",
            "name=\ud800",
            "name=!!set {a}",
            "name=!!timestamp x",
            "name=!!bool x",
        ),
        *("name=!!python/object:os.system x", "name={null: 2}", "name={[1]: 2}", "name=${", "name=${foo:1}"),
        *("name=${name}", "name=${oc.env:NOPE}", "name=\x00", "name=&a [*a]", "=", "a..b=1"),
    ],
)
def test_overrides_that_no_settings_can_be_made_of(override: str) -> None:
    base = {"name": "x", "many": [1, 2], "inner": {"count": 1}}
    with pytest.raises(InputError) as caught:
        load_mapping(base, [override])
    message = str(caught.value)
    assert override[:20].encode("unicode_escape").decode() in message or "stored settings: " in message, message
    assert len(message) < 500 and message.isprintable()


@pytest.mark.parametrize(
    "override", ["inner=3", "many=3", "inner.count.x=1", "inner.count={}", "name=[1]", "a.b.c.d=1"]
)
def test_overrides_that_clash_in_type_are_refused_by_name(override: str) -> None:
    base = {"name": "x", "many": [1, 2], "inner": {"count": 1}}
    with pytest.raises(InputError) as caught:
        build(Outer, load_mapping(base, [override]))
    assert str(caught.value).startswith(override.split("=")[0].removesuffix(".x").split(".b")[0])


TEXTS = ["1", "off", "null", "~x", "a: b", "[a]", "a #1", " a ", "q\"uo'te", "é 🦊", "\x7f\x01", "${seed}", r"\${seed}"]


@pytest.mark.parametrize("text", [*TEXTS, r"a\b", r"a\\${oc.env:HOME}\b", "${", "$seed", "a=b"])
def test_a_text_as_an_override_is_what_it_is(text: str) -> None:
    assert load_mapping({"seed": 1}, [text_override("data_path", text)]) == {"seed": 1, "data_path": text}


@pytest.mark.parametrize("text", ["/a/folder #1", "#1", "5 # frames", "a#b"])
def test_overrides_hold_no_comments(text: str) -> None:
    """A folder whose name ends in ` #1` is not the one without."""
    assert load_mapping({}, [f"output_folder={text}"]) == {"output_folder": text}
    assert load_mapping({}, ["steps=[1, 2] # both"]) == {"steps": [1, 2]}
    assert load_mapping({}, ["output_folder='a #1'"]) == {"output_folder": "a #1"}
