"""A field is all that a flag needs: its help, its range and its row in the documents follow."""

from __future__ import annotations

import argparse
import io
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import msgspec
import pytest
from msgspec import Meta

from kunserve_sglang.core.cluster_config import ClusterConfig
from kunserve_sglang.core.errors import ConfigurationError
from kunserve_sglang.core.flags import (
    Flag,
    Form,
    about,
    add_flags,
    check_ranges,
    flag_table,
    flags_of,
    read_flags,
    secret_values,
)
from kunserve_sglang.launch.options import INSTANCE_FLAGS, SERVER_FLAGS, LaunchOptions
from kunserve_sglang.launch_instance import parser as instance_parser
from kunserve_sglang.launch_server import kunserve_parser

PROGRAMS = {"launch_server": (kunserve_parser, SERVER_FLAGS),
            "launch_instance": (instance_parser, INSTANCE_FLAGS)}  # fmt: skip
FLAGS = [(p, r, flag) for p, (_, records) in PROGRAMS.items() for r in records
         for flag in flags_of(r)]  # fmt: skip
IDS = [f"{program} {flag.name}" for program, _, flag in FLAGS]


class Colour(StrEnum):
    RED = "red"
    BLUE = "blue"


class More(ClusterConfig, frozen=True, kw_only=True):
    """A record as it would be with some fields more."""

    colour: Annotated[Colour, about("`red` or [else](#colours)")] = Colour.RED
    speed: Annotated[Annotated[float, Meta(gt=0, le=9)] | None, about("m/s", default="any")] = None
    loud: Annotated[bool, about("100 % of it")] = False
    room: Annotated[int, about("how much", form=Form.SIZE, metavar="SIZE")] = 1
    word: Annotated[str | None, about("what to say", form=Form.SECRET)] = None
    rules: Annotated[tuple[str, ...], about("what holds", metavar="RULE")] = ()
    unseen: Annotated[int, Meta(ge=1)] = 4


def parsed(*words: str, **environment: str) -> More:
    parser = argparse.ArgumentParser()
    add_flags(parser.add_argument_group(), [More])
    return read_flags(parser.parse_args(words), More, environment)


def test_one_more_field_is_one_more_flag() -> None:
    assert parsed() == More()
    given = parsed("--colour=blue", "--speed=3", "--loud", "--room=2KiB", "--max-queued=7")
    assert given == More(colour=Colour.BLUE, speed=3.0, loud=True, room=2048, max_queued=7)
    with pytest.raises(SystemExit):
        parsed("--unseen=5")


def test_a_tuple_takes_all_that_is_given() -> None:
    assert parsed().rules == ()
    assert parsed("--rules=one", "--rules", "two=2").rules == ("one", "two=2")


def test_one_more_field_is_one_more_row_and_one_more_line_of_help() -> None:
    assert flag_table([More]).splitlines()[-6:] == [
        "| `--colour` | `red` | `red` or [else](#colours) |",
        "| `--speed` | any | m/s |",
        "| `--loud` | off | 100 % of it |",
        "| `--room` | 1 | how much |",
        "| `--word`, `--word-file` | `KUNSERVE_WORD` | what to say |",
        "| `--rules` | none | what holds |",
    ]
    parser = argparse.ArgumentParser()
    add_flags(parser.add_argument_group(), [More])
    out = io.StringIO()
    parser.print_help(out)
    text = " ".join(out.getvalue().split())
    assert "red or else (default: red)" in text
    assert "100 % of it" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--speed=0", "--speed must be above 0 and at most 9"),
        ("--speed=9.5", "--speed must be above 0 and at most 9"),
        ("--speed=nan", "--speed must be above 0 and at most 9"),
        ("--max-queued=-1", "--max-queued must not be negative"),
        ("--max-in-flight=0", "--max-in-flight must be at least 1"),
        ("--room=lots", "'lots' is no size"),
    ],
)
def test_values_out_of_range_are_refused_by_the_name_of_the_flag(words: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        parsed(words)
    with pytest.raises(ConfigurationError, match="--unseen must be at least 1"):
        check_ranges(More(unseen=0))


def test_keys_come_from_flags_files_and_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("from a file\n")
    env = {"KUNSERVE_WORD": "from the environment"}
    assert parsed("--word=given", **env).word == "given"
    assert parsed(f"--word-file={file}", **env).word == "from a file"
    assert parsed(**env).word == "from the environment"
    assert parsed(KUNSERVE_WORD="").word is None
    with pytest.raises(ConfigurationError, match="not both"):
        parsed("--word=given", f"--word-file={file}")
    file.write_text("\n")
    with pytest.raises(ConfigurationError, match="no key in it"):
        parsed(f"--word-file={file}")
    with pytest.raises(ConfigurationError, match=r"--word-file /nowhere: No such file"):
        parsed("--word-file=/nowhere")


def test_only_keys_on_the_command_line_have_to_be_hidden(tmp_path: Path) -> None:
    flags = kunserve_parser().parse_args(
        ["--admin-api-key=one", "--api-key=two", f"--read-api-key-file={tmp_path}"]
    )
    assert sorted(secret_values(flags, SERVER_FLAGS)) == ["one", "two"]


# --- all there are ------------------------------------------------------------------------------


def test_without_flags_the_defaults_of_the_fields_stand() -> None:
    flags = kunserve_parser().parse_args([])
    assert read_flags(flags, ClusterConfig, {}) == ClusterConfig()
    assert read_flags(flags, LaunchOptions, {}) == LaunchOptions()


@pytest.mark.parametrize(("program", "record", "flag"), FLAGS, ids=IDS)
def test_every_flag_is_bounded_and_explained(
    program: str, record: type[msgspec.Struct], flag: Flag
) -> None:
    assert flag.description
    assert not flag.description.endswith(".")
    out = io.StringIO()
    PROGRAMS[program][0]().print_help(out)
    assert all(f"  {name}" in out.getvalue() for name in flag.names)
    assert flag.field in record.__struct_fields__
    if flag.kind in (int, float) and flag.form is Form.PLAIN:
        low = msgspec.structs.replace(
            record(**({"router": "r"} if "router" in record.__struct_fields__ else {}))
        )
        with pytest.raises(ConfigurationError, match=f"{flag.name} must "):
            msgspec.structs.replace(low, **{flag.field: -1})


def test_a_number_that_is_no_flag_is_bounded_as_well() -> None:
    hidden = set(ClusterConfig.__struct_fields__) - {f.field for f in flags_of(ClusterConfig)}
    assert hidden
    for name in hidden:
        with pytest.raises(ConfigurationError, match="must be above 0"):
            ClusterConfig(**{name: 0.0})


@pytest.mark.parametrize("program", PROGRAMS)
def test_no_two_records_of_a_program_have_a_flag_of_the_same_name(program: str) -> None:
    names = [name for p, _, flag in FLAGS if p == program for name in flag.names]
    assert len(set(names)) == len(names)
