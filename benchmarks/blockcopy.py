"""BlockCopy's rule (Verelst and Tuytelaars, ICCV 2021) as a peer: `python benchmarks/blockcopy.py`.

Regions run at the finest level or not at all. A small network by region, which sees what our agents see, chooses at
random by its probabilities, and learns by REINFORCE while it runs, from no labels: the reward of a region that runs is
what its output changed by, the information gained, plus 5 (T - S) |T - S|, where S is the share of regions that ran
lately and T the target; of one that does not run, the opposite of it. It learns on training clips of generated video as
one stream, then goes on over the test clips, where it is measured. Prints, for each kind of video, its mean change of
BOPs at equal accuracy against the best of many settings of Dynamic ResQ; what its network costs is counted, what
learning costs is not.
"""

import sys

import torch
from torch import Tensor, nn

from resq_rl.envs import ActionScheme, Decision, FrameView, Problem, measure
from resq_rl.envs.observation import pool_mean
from resq_rl.experiments.results.fronts import compare_fronts
from resq_rl.perception import Segmentation, compact_ddrnet
from resq_rl.policies import DynamicResQ
from resq_rl.quantization import DEFAULT_KAPPA, LevelField, ResQModel
from resq_rl.video import GeneratedVideo

VIDEOS = {
    "as in training": GeneratedVideo(),
    "noise of 0.05 instead of 0.02": GeneratedVideo(noise=0.05),
    "twice as fast": GeneratedVideo(speed=2.0),
}
CALIBRATION, LEARNING, TEST = 12, 24, 12
GRID = (6, 10)
TARGETS = (0.1, 0.2, 0.35, 0.5, 0.7)
COST, MOMENTUM, RATE, HIDDEN = 5.0, 0.9, 1e-3, 16
TAUS, KAPPAS = (0.3, 0.45, 0.7, 1.0, 1.4, 1.95, 2.8), (DEFAULT_KAPPA, (1.0, 2.0, 6.0), (1.0, 1.6, 6.0))


class Watched(Segmentation):
    """Segmentation that keeps the probabilities of the last frame."""

    latest: Tensor | None = None

    def predict(self, output: Tensor) -> Tensor:
        """The class of every pixel."""
        self.latest = output.softmax(1)
        return super().predict(output)


class BlockCopy:
    """The rule, for one clip at a time.

    Args:
        task: keeps the probabilities of the frames that run.
        problem: says how many layer groups, levels and regions there are.
        target: the share of regions that are to run.
    """

    reference, bits, trade_off, trade_off_range = "previous", 8, 1.0, (1.0, 1.0)

    def __init__(self, task: Watched, problem: Problem, target: float) -> None:
        self.task, self.problem, self.target, self.ran = task, problem, target, target
        self.scheme = ActionScheme(
            "region_bits", "region", problem.groups, problem.grid, len(problem.model.config.levels)
        )
        inputs = self.scheme.observation_size
        self.network = nn.Sequential(nn.Linear(inputs, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 1))
        self.optimizer = torch.optim.RMSprop(self.network.parameters(), lr=RATE, weight_decay=1e-3)
        self.before: Tensor | None = None  # the probabilities before the last decision
        self.chosen: tuple[Tensor, Tensor] | None = None  # logits of the last decision, and what it was

    @property
    def macs(self) -> int:
        """Multiply-accumulates of a frame."""
        inputs = self.scheme.observation_size
        return self.problem.regions * HIDDEN * (inputs + 1)

    @property
    def settings(self) -> dict[str, object]:
        """What identifies it."""
        return {"target": self.target}

    @torch.enable_grad()
    def decide(self, view: FrameView) -> Decision:
        """Learn from the last decision, unless a clip began, and make the next."""
        if int(view.age[0]) > 0:
            self._learn()
        logits = self.network(self.scheme.observe(view.observation))[:, 0]
        runs = torch.rand(len(logits)) < logits.detach().sigmoid()
        self.before, self.chosen = self.task.latest, (logits, runs)
        top = self.scheme.levels - 1
        levels = (runs.long() * top).view(1, 1, *view.grid).expand(-1, view.groups, -1, -1)
        return Decision(view.age < 0, LevelField(levels))

    def _learn(self) -> None:
        assert self.chosen is not None
        assert self.before is not None
        assert self.task.latest is not None
        logits, runs = self.chosen
        now, before = self.task.latest.clamp_min(1e-6), self.before.clamp_min(1e-6)
        gained = pool_mean((now * (now / before).log()).sum(1), self.problem.grid).flatten()
        self.ran = MOMENTUM * self.ran + (1 - MOMENTUM) * float(runs.float().mean())
        spare = self.target - self.ran
        reward = (gained + COST * spare * abs(spare)) * torch.where(runs, 1.0, -1.0)
        likelihood = nn.functional.logsigmoid(torch.where(runs, logits, -logits))
        self.optimizer.zero_grad()
        (-(reward * likelihood).mean()).backward()
        self.optimizer.step()


def main() -> None:
    """Learn and measure at every target, and print a row for each kind of video."""
    torch.set_num_threads(1)
    task = Watched()
    print("| video | against Dynamic ResQ | accuracy and BOPs by target |\n| --- | --- | --- |", flush=True)
    for name in sys.argv[1:] or VIDEOS:
        torch.manual_seed(0)
        video = VIDEOS[name]
        model = ResQModel(compact_ddrnet(), torch.zeros(1, 3, *video.size)).compile()
        model.calibrate([video.clip("train", i).frames for i in range(CALIBRATION)])
        train = Problem.prepare(model, task, [video.clip("train", i) for i in range(LEARNING)], grid=GRID)
        test = Problem.prepare(model, task, [video.clip("test", i) for i in range(TEST)], grid=GRID)
        heuristics = [DynamicResQ("previous", 0, tau=tau, kappa=kappa) for tau in TAUS for kappa in KAPPAS]
        anchors = [measure(test, heuristic) for heuristic in heuristics]
        front = []
        for target in TARGETS:
            peer = BlockCopy(task, test, target)
            measure(train, peer, slots=1)
            front.append(measure(test, peer, slots=1))
        entry = compare_fronts({0: front}, anchors, float_accuracy=test.float_accuracy, seed=0)
        interval = "no interval" if entry.ci95 is None else f"[{entry.ci95[0]:+.1f}, {entry.ci95[1]:+.1f}]"
        change = "no overlap" if entry.value is None else f"{entry.value:+.1f}% {interval}"
        print(f"| {name} | {change} | {', '.join(f'{m.accuracy:.3f} at {m.bops:.3f}' for m in front)} |", flush=True)


if __name__ == "__main__":
    main()
