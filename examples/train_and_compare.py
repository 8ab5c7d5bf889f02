"""Train a policy and compare it with Dynamic ResQ over the Python API, without Hydra or MLflow.

    python examples/train_and_compare.py

Settings are tiny, so that it ends in seconds and shows the steps; the figures of so few clips mean little.
"""

import numpy as np
import torch

from resq_rl.envs import (
    ActionScheme,
    BatchedEnvironment,
    EpisodeSettings,
    Measurement,
    NetworkEngine,
    Policy,
    Problem,
    Streams,
    measure,
)
from resq_rl.envs.sb3 import AgentsVecEnv
from resq_rl.experiments.results.statistics import bd_bops
from resq_rl.perception import Segmentation, compact_ddrnet
from resq_rl.policies import DynamicResQ, best_policies
from resq_rl.policies.ppo import FirstChoice, PPOSettings, train_ppo
from resq_rl.quantization import ResQModel
from resq_rl.video import SPLITS, GeneratedVideo, Split

SIZE, GRID = (64, 96), (4, 6)
TRADE_OFFS = (0.05, 1.0)  # lambda, the price of bits: one policy is trained for all of this range


def main(frames: int = 400) -> None:
    """Calibrate, tune the heuristic, train for so many frames, and compare on test clips."""
    torch.set_num_threads(1)  # on frames this small, more threads would only wait for each other
    # A frozen network and clips in three disjoint splits; the first makes the second's ranges.
    video = GeneratedVideo(size=SIZE, frames=8, train=4, validation=2, test=3)
    task = Segmentation()
    model = ResQModel(compact_ddrnet(), torch.zeros(1, 3, *SIZE)).compile()
    clips = {split: video.clips(split) for split in SPLITS}
    model.calibrate([clip.frames for clip in clips["train"][:2]])
    problems = {split: Problem.prepare(model, task, clips[split], grid=GRID) for split in SPLITS}

    def measured(policy: Policy, split: Split) -> Measurement:
        return measure(problems[split], policy)

    # The heuristic, tuned on validation clips, measured on test clips.
    settings = [DynamicResQ("previous", interval, tau=tau) for interval in (0, 4) for tau in (0.3, 0.7, 1.4)]
    tuned = [policy for policy, _ in best_policies(settings, lambda p: measured(p, "validation"))]
    heuristic = [measured(policy, "test") for policy in tuned]

    # Every region of every clip is an agent that chooses a threshold for each layer group; all share one small network.
    scheme = ActionScheme(
        "region_thresholds", "region", len(model.groups), GRID, len(model.config.levels), by_group=True
    )
    streams = Streams(NetworkEngine(problems["train"]), slots=4, trade_off_range=TRADE_OFFS)
    episodes = EpisodeSettings(trade_off=TRADE_OFFS, intervals=(0, 4), reward_scale=3.0, relative=True)
    agents = AgentsVecEnv(BatchedEnvironment(streams, scheme, episodes))
    begin = FirstChoice(scheme.thresholds.index(0.7), interval=4)
    ppo = PPOSettings(frames=frames, n_steps=7, batch_size=672, learning_rate=2e-3, ent_coef=3e-4)
    policy, report = train_ppo(agents, ppo, seed=0, warm_start=lambda trade_off: begin)
    print(f"trained on {report.frames} frames; the policy costs {policy.macs:,} multiply-accumulates per frame")

    # One policy at several values of lambda is a front. Validation chooses what is measured on test clips.
    candidates = [policy.at(float(t), i) for t in np.geomspace(*TRADE_OFFS, 3) for i in (0, 4)]
    chosen = [p for p, _ in best_policies(candidates, lambda p: measured(p, "validation"))]
    learned = [measured(p, "test") for p in chosen]

    print(f"float mean IoU {problems['test'].float_accuracy:.3f}")
    for name, front in (("Dynamic ResQ", heuristic), ("PPO", learned)):
        for point in front:
            print(f"{name:12} {point.bops:.3f} of W8A8, mean IoU {point.accuracy:.3f}")
    rows = [[(m.accuracy, m.bops) for m in front] for front in (learned, heuristic)]
    change = bd_bops(*rows, float_accuracy=problems["test"].float_accuracy)
    print("BOPs at equal accuracy:", change.reason if change.value is None else f"{change.value:+.1f}%")


if __name__ == "__main__":
    main()
