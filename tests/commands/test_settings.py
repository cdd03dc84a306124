"""`nnunetv2_semi settings`: tables, JSON, and the tables of a page."""

import json

import pytest

from nnunetv2_semi import cli
from nnunetv2_semi.methods.fixmatch import FixMatchSettings
from nnunetv2_semi.methods.settings import Settings, settings_from_plan


def test_the_table_has_a_line_for_each_setting_of_the_trainer(capsys):
    assert cli.main(["settings", "nnUNetTrainerSemiFixMatch"]) == 0
    lines = capsys.readouterr().out.splitlines()
    own = [name for name in FixMatchSettings.model_fields if name not in Settings.model_fields]
    assert [line.split()[0] for line in lines[1:len(own) + 1]] == own
    confidence = next(line for line in lines if line.startswith("confidence"))
    assert confidence.split()[1:6] == ["0.8", "0.95", "between", "0", "and"]
    assert "num_epochs" not in "".join(lines) and lines[-1].endswith("nnunetv2_semi settings")


def test_without_a_trainer_it_shows_what_all_have(capsys):
    assert cli.main(["settings"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["setting", *Settings.model_fields]


@pytest.mark.parametrize("trainer", ["FixMatch", "nnUNetTrainerSemiFixMatch"])
def test_json_can_be_pasted_into_a_plans_file(capsys, trainer):
    assert cli.main(["settings", trainer, "--json"]) == 0
    semi = json.loads(capsys.readouterr().out)
    assert semi["FixMatch"]["confidence"] == 0.8 and semi["num_epochs"] == 1000
    assert settings_from_plan(FixMatchSettings, semi, "FixMatch") == FixMatchSettings()


@pytest.mark.parametrize("section, trainer", [("SemiCML", "CML"), ("Distillation", "Distill")])
def test_the_name_of_a_plans_files_section_will_do(capsys, section, trainer):
    for name in (section, trainer):
        assert cli.main(["settings", name, "--json"]) == 0
    by_section, by_trainer = capsys.readouterr().out.split("\n}\n{")
    assert section in json.loads(by_section + "}") and by_section[1:] + "\n}\n" == by_trainer


@pytest.mark.parametrize("trainer", ["Nonsense", "nnUNetTrainer"])
def test_a_trainer_without_settings_is_an_error_that_names_ours(capsys, trainer):
    assert cli.main(["settings", trainer]) == 1
    error = capsys.readouterr().err
    assert f"{trainer} is no trainer with settings of its own. Ours are BCP, CPS, Distillation," in error


def test_tables_of_a_page_are_renewed_and_the_rest_stays(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- settings: CPS -->\nold\n<!-- end -->\nafter\n")
    assert cli.main(["settings", "--write", str(page)]) == 0
    lines = page.read_text().splitlines()
    assert (lines[0], lines[1], lines[-2], lines[-1]) == ("before", "<!-- settings: CPS -->", "<!-- end -->", "after")
    assert "| `cps_loss` | `\"dice_ce\"` | `\"ce\"` | dice_ce, ce |" in page.read_text() and "old" not in lines
