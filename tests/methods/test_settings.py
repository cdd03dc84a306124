import json

import pytest

from nnunetv2_semi.errors import UserError
from nnunetv2_semi.methods.cps import CPS
from nnunetv2_semi.methods.fixmatch import FixMatch
from nnunetv2_semi.methods.fusion import Fusion
from nnunetv2_semi.methods.mass import MASS
from nnunetv2_semi.methods.mean_teacher import MeanTeacher, MeanTeacherSettings
from nnunetv2_semi.methods.mix import Mix
from nnunetv2_semi.methods.rcps import RCPS
from nnunetv2_semi.methods.semi_cml import SemiCML, SemiCMLSettings
from nnunetv2_semi.methods.settings import (
    Settings,
    changed,
    merged_settings,
    paper_value,
    settings_for_plan,
    settings_from_plan,
    value_range,
)
from nnunetv2_semi.methods.synfoc import SynFoC
from nnunetv2_semi.methods.uamt import UAMT


def test_defaults_without_a_semi_object():
    assert settings_from_plan(SemiCMLSettings, {}, "SemiCML") == SemiCMLSettings()


@pytest.mark.parametrize("method", [Mix, MeanTeacher, UAMT, FixMatch, CPS, RCPS, SynFoC, Fusion, MASS, SemiCML])
def test_unlabelled_terms_have_their_full_weight_after_a_fifth_of_training(method):
    """The learning rate falls all the while: a ramp over the whole training leaves a fifth of their effect."""
    assert 0 < method.Settings().ramp_fraction <= 0.2


def test_keys_at_the_top_and_in_the_methods_section():
    semi = {"num_epochs": 7, "consistency_weight": 1, "MeanTeacher": {"noise": 0.2, "num_epochs": 9}}
    settings = settings_from_plan(MeanTeacherSettings, semi, "MeanTeacher")
    assert (settings.num_epochs, settings.consistency_weight, settings.noise) == (9, 1.0, 0.2)
    assert isinstance(settings.consistency_weight, float)


def test_sections_of_other_methods_are_left_alone():
    semi = {"num_epochs": 7, "SemiCML": {"asc_weight": 1.0}, "MyMethod": {"anything": 1}}
    assert settings_from_plan(MeanTeacherSettings, semi, "MeanTeacher").num_epochs == 7


@pytest.mark.parametrize("name", ["Meanteacher", "MEANTEACHER", "MeanTeachr", "MeanTeacher_"])
def test_a_misspelt_method_is_refused(name):
    with pytest.raises(UserError, match=f"no method '{name}'. Did you mean 'MeanTeacher'"):
        settings_from_plan(MeanTeacherSettings, {name: {}}, "MeanTeacher")
    settings_from_plan(MeanTeacherSettings, {name: {}, "MeanTeacher": {}}, "MeanTeacher")  # then it is another one's


@pytest.mark.parametrize("section, others", [
    ("FixMatch", ["FlexMatch", "MyFixMatch"]), ("CPS", ["RCPS", "ICPS"]), ("UAMT", ["UMT"]),
    ("EntropyA", ["EntropyB"]), ("Mix", ["EMix", "MixOwn"])])
def test_users_own_methods_may_have_names_like_another_ones(section, others):
    assert settings_from_plan(Settings, {name: {"own": 1} for name in others}, section) == Settings()


def test_settings_put_on_top_win_over_what_sections_say():
    semi = {"seed": 1, "num_epochs": 5, "Mix": {"seed": 2, "confidence": 0.9}, "modalities": {"T1": [0]}}
    merged = merged_settings(semi, {"seed": 3, "modalities": {"MR": [0]}, "Mix": {"cutmix": 0.1},
                                    "FixMatch": {"seed": 4}})
    assert merged == {"seed": 3, "num_epochs": 5, "Mix": {"confidence": 0.9, "cutmix": 0.1}, "modalities": {"MR": [0]},
                      "FixMatch": {"seed": 4}}
    assert semi["Mix"] == {"seed": 2, "confidence": 0.9}


@pytest.mark.parametrize("semi, parts", [
    ({"num_epoch": 5}, ["'num_epoch'", "Did you mean 'num_epochs'", "Allowed:", "ema_decay"]),
    ({"MeanTeacher": {"asc_weight": 5}}, ["'asc_weight'", "Allowed:"]),
    ({"num_epochs": "5"}, ["num_epochs must be int", "'5'"]),
    ({"num_epochs": True}, ["num_epochs must be int", "True"]),
    ({"num_epochs": 5.5}, ["num_epochs must be int"]),
    ({"num_epochs": 0}, ["num_epochs must be at least 1"]),
    ({"noise": [1]}, ["noise must be float"]),
    ({"deploy": "both"}, ["deploy must be", "'teacher'", "'both'"]),
    ({"deep_supervision": 1}, ["deep_supervision must be bool"]),
    ({"MeanTeacher": 3}, ["'MeanTeacher' must be an object"]),
    ([], ['"semi"', "must be an object"]),
])
def test_what_is_wrong_is_named_with_what_is_allowed(semi, parts):
    with pytest.raises(UserError) as error:
        settings_from_plan(MeanTeacherSettings, semi, "MeanTeacher")
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize("name, value", [("prel_start", 1.5), ("max_slices", 0), ("temperature", 0)])
def test_ranges_of_semi_cml(name, value):
    with pytest.raises(UserError, match=name):
        settings_from_plan(SemiCMLSettings, {name: value}, "SemiCML")


def test_none_is_allowed_where_the_annotation_says_so():
    settings = settings_from_plan(SemiCMLSettings, {"unlabelled_batch_size": None, "better_modality": None}, "SemiCML")
    assert settings.unlabelled_batch_size is None
    assert settings_from_plan(SemiCMLSettings, {"better_modality": "T2"}, "SemiCML").better_modality == "T2"


@pytest.mark.parametrize("cls, name", [(Settings, "Supervised"), (SemiCMLSettings, "SemiCML")])
def test_written_to_a_plan_and_read_again_they_are_the_same(cls, name):
    settings = cls(num_epochs=3, modalities={"T1": [0], "T2": [1, 2]}, regions=True)
    stored = json.loads(json.dumps(settings_for_plan(settings, name)))
    assert settings_from_plan(cls, stored, name) == settings
    assert settings_from_plan(MeanTeacherSettings, stored, "MeanTeacher").num_epochs == 3


@pytest.mark.parametrize("cls, name, value, expected", [
    (MeanTeacherSettings, "ema_decay", 1.5, "between 0 and 1"), (MeanTeacherSettings, "noise", -0.1, "at least 0"),
    (Settings, "momentum", 1.0, "at least 0 and below 1"), (Settings, "initial_lr", 0, "greater than 0"),
    (SemiCMLSettings, "asc_weight", -1.0, "at least 0"), (Settings, "unlabelled_batch_size", 0, "at least 1"),
    (Settings, "initial_lr", float("nan"), "float"),
])
def test_ranges_are_named(cls, name, value, expected):
    with pytest.raises(UserError, match=f'Plans file, "semi": {name} must be .*{expected}.*, got {value!r}'):
        cls(**{name: value})


def test_settings_cannot_be_changed_and_unknown_ones_not_be_made():
    with pytest.raises(ValueError, match="frozen"):
        Settings().seed = 3
    with pytest.raises(UserError, match="unknown setting 'sed'"):
        Settings(sed=3)


def test_a_field_declared_again_keeps_meaning_and_range_and_its_parent_its_default():
    class Again(MeanTeacherSettings):
        """Settings of a test."""

        noise: float = changed(MeanTeacherSettings, "noise", 0.5, paper=0.2)
    new, old = Again.model_fields["noise"], MeanTeacherSettings.model_fields["noise"]
    assert (new.default, old.default, new.description) == (0.5, 0.1, old.description)
    assert (paper_value(new), paper_value(old), value_range(new)) == (0.2, ..., "at least 0")
    with pytest.raises(UserError, match="noise must be at least 0"):
        Again(noise=-1.0)
