from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Literal

import pytest
import tyro

from pipeline.command_line import one_line, parse_flags, require_at_least_1
from pipeline.program import InputError


@dataclass(frozen=True, kw_only=True)
class Moco:
    queue: int = 64
    """Length of the queue."""
    mode: Literal["fast", "exact"] = "fast"

    def __post_init__(self):
        if self.queue < 1:
            raise InputError(f"--moco.queue {self.queue}: give a number of at least 1")


@dataclass(frozen=True, kw_only=True)
class Settings:
    source: Annotated[Path, tyro.conf.Positional]
    """Folder of pictures."""
    moco: Moco = field(default_factory=Moco)


def refusal(*args):
    with pytest.raises(InputError) as error:
        parse_flags(Settings, "A program.", args)
    text = str(error.value)
    assert "\n" not in text and not set(text) & set("│╭╰─")
    return text


def test_flags_become_settings():
    settings = parse_flags(Settings, "A program.", ["pictures", "--moco.queue", "8"])
    assert settings == Settings(source=Path("pictures"), moco=Moco(queue=8))


def test_flags_change_a_default():
    default = Settings(source=Path("a"), moco=Moco(queue=9))
    settings = parse_flags(Settings, "A program.", ["--moco.mode", "exact"], default)
    assert settings == Settings(source=Path("a"), moco=Moco(queue=9, mode="exact"))


def test_a_value_that_nested_settings_refuse_is_named_once():
    text = refusal("x", "--moco.queue", "0")
    assert text.startswith("--moco.queue 0: give a number of at least 1")
    assert text.count("--moco.queue") == 1


def test_a_value_of_the_wrong_type_names_flag_and_value():
    text = refusal("x", "--moco.queue", "many")
    assert "--moco.queue" in text and "'many'" in text


def test_a_misspelt_flag_has_a_suggestion():
    assert "--moco.quue" in (text := refusal("x", "--moco.quue", "3"))
    assert "did you mean --moco.queue?" in text


def test_a_choice_lists_the_choices():
    text = refusal("x", "--moco.mode", "slow")
    assert "slow" in text and "fast" in text and "exact" in text


def test_a_missing_argument_is_named():
    assert "Folder of pictures" in refusal()


def test_a_long_message_is_whole_on_a_narrow_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    assert "give a number of at least 1" in refusal("x", "--moco.queue", "0")


def test_help_still_leaves_with_code_0(capsys):
    with pytest.raises(SystemExit) as leaving:
        parse_flags(Settings, "A program.", ["--help"])
    assert not leaving.value.code
    assert "Length of the queue" in capsys.readouterr().out


def test_a_box_for_a_terminal_without_unicode_is_one_line_too():
    box = """
 Value error
 ----------------------------------------------------
  Error parsing Settings: --moco.queue 0: give more
  ---------------------------------------------------
  For full helptext, see x.py --help
"""
    assert one_line(box) == "--moco.queue 0: give more (--help lists every flag)"
    rule = "-" * 40
    box = f"Unrecognized options\n{rule}\nUnrecognized options: --moco.queu\n{rule}\n"
    box += f"Perhaps you meant:\n  --moco.queue INT\n{rule}\nFor full helptext, run x.py --help"
    assert one_line(box).startswith("Unrecognized options: --moco.queu: did you mean --moco.queue?")


@pytest.mark.parametrize("value", [0, -3])
def test_a_number_below_1_names_flag_and_value(value):
    with pytest.raises(InputError, match=f"--log-every {value}: give a number of at least 1"):
        require_at_least_1(SimpleNamespace(batch=1, log_every=value), "batch", "log_every")


def test_1_is_enough():
    require_at_least_1(SimpleNamespace(batch=1), "batch")
