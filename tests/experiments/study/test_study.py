"""What a study is made of, whichever command asks for it."""

from resq_rl.experiments.config.composition import load_settings
from resq_rl.experiments.study.study import build_study
from tests.envs.problems import TINY_NETWORK

AUTO = [
    *TINY_NETWORK,
    *("video.train=3", "video.validation=1", "video.test=1", "video.frames=5", "video.size=[32,48]"),
    *(
        "quantization.calibration_clips=2",
        "quantization.residual_weight_bits=auto",
        "quantization.weight_rounding=nearest",
    ),
]


def test_all_commands_choose_the_same_bits_for_the_layers() -> None:
    trained = build_study(load_settings("train", AUTO), ["train", "validation"]).model.config
    evaluated = build_study(load_settings("compare", AUTO), ["test"]).model.config
    assert isinstance(trained.residual_weight_bits, dict)
    assert set(trained.residual_weight_bits) == {"stem.0", "body.0", "head"}
    assert trained == evaluated
