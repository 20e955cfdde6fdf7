"""What fitting a variant to a limit came to: the value that the stage `fit` passes on. It is beside values.py, and as small."""

from pydantic import BaseModel, ConfigDict

from configs.schema import SMALL_GROUP, Variant
from tasks.metrics import nats


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True)


class FitGroup(_Value):
    """Modules that are quantized together or not at all, and what each of their choices costs and damages."""

    block: int
    modules: list[str]
    """By the names that the model has for them."""
    bits: list[int]
    """The choices: how many bits a weight has. The last one is the original's; one with as many as the first has smaller groups
    of weights that share a scale."""
    bytes: list[int]
    """What the group takes with each, without the file's header."""
    kl: list[float]
    """The KL divergence of the model in which this group alone is quantized so, nats a token; 0 for the original.

    Where codes undo what others did, it is the mean of that and of how much smaller the divergence of everything quantized is
    without it. That of the least bits is measured; those between are smaller as the squared error of the weights is, or as
    `tasks.fit.search.SMALLER` says.
    """

    def called(self, choice: int) -> str:
        """A choice, as it ends "a group is …"."""
        small = choice > 0 and self.bits[choice] == self.bits[0]
        return f"in groups of {SMALL_GROUP}" if small else f"in {self.bits[choice]} bits"

    @property
    def kind(self) -> str:
        """What its modules are called in every block: `q_proj+k_proj+v_proj`; `experts` for experts."""
        if any(".experts." in name for name in self.modules):
            return "experts"
        return "+".join(dict.fromkeys(name.rpartition(".")[2] for name in self.modules))


class FitPoint(_Value):
    """A mix, and what is known of it. KL divergences are of the fit text, nats a token."""

    name: str
    """`all quantized`, `mix 1`, …, for those that were measured; empty for the predicted curve."""
    bytes: int
    """Of all weights."""
    kept: int
    """How many groups stay in 16 bits."""
    in_8_bits: int = 0
    """How many others are in 8 bits, where all else is in fewer."""
    in_small_groups: int = 0
    """How many others have groups of 32 weights to a scale, where all else has larger ones."""
    predicted: float | None
    """What its KL was said to be before it was measured."""
    kl_mean: float | None = None
    kl_mean_low: float | None = None
    kl_mean_high: float | None = None
    top1_agreement: float | None = None
    perplexity_ratio: float | None = None
    holds: bool | None = None
    """Whether it keeps the limit at the pessimistic end of its interval; None where it was not measured."""


class Fitted(_Value):
    """The mix that keeps a variant's limit, and what was measured to find it."""

    limit: str
    """As people read it: `KL ≤ 0.05`, `weights ≤ 1.2 GB`."""
    modules: list[str]
    """The modules that stay in 16 bits, by the names that the model has for them."""
    in_8_bits: list[str] = []
    """The modules that are quantized to 8 bits, where all else is quantized to fewer."""
    in_small_groups: list[str] = []
    """The modules that have groups of 32 weights to a scale, where all else has larger ones."""
    group_size: int | None = None
    """How many weights share a scale, as it was decided with all quantized."""
    taken: FitPoint
    measured: list[FitPoint]
    """Every mix that was measured, in the order in which that was done; the first is all quantized."""
    curve: list[FitPoint]
    """What the frontier is predicted to be, from the measured mixes: sizes and KLs from the smallest mix on."""
    error: float | None
    """How far the predictions were off, on average, relative to what was measured; None where none was tested."""
    groups: list[FitGroup]
    next: str
    """Where one more megabyte would buy most, a sentence; empty where nothing is left to buy."""
    text: str
    """What it was measured on, a sentence."""
    codes: str
    """Folder of a checkpoint with the codes that were measured: where all is quantized, or, calibrated, that of the mix."""
    codes_digest: str
    """The digest of that."""
    seconds: float
    """What the sensitivities and the search took, when they were made."""
    cached: bool = False

    def mix(self, variant: Variant) -> Variant:
        """What `variant`, whose limit this is about, came to."""
        return variant.keeping(self.modules, self.finer, self.group_size)

    @property
    def finer(self) -> list[str]:
        """The modules that have more than the least, and are not in 16 bits."""
        return self.in_8_bits + self.in_small_groups

    @property
    def kept(self) -> str:
        """How many groups of modules stay in 16 bits, or are in 8: `29 of 120 groups of modules stay in 16 bits`."""
        between = f", {self.taken.in_8_bits} are in 8" if self.in_8_bits else ""
        if self.in_small_groups:
            between = f", {self.taken.in_small_groups} have 32 weights to a scale"
        return f"{self.taken.kept} of {len(self.groups)} groups of modules stay in 16 bits{between}"

    @property
    def sentence(self) -> str:
        """What a user of the model should know of it."""
        kl = " up to ".join(nats(end) for end in (self.taken.kl_mean, self.taken.kl_mean_high) if end is not None)
        return (
            f"It was fitted to {self.limit}: {self.kept}, chosen by what each does to the model's output; on the fit text "
            f"({self.text}) it has mean KL {kl}."
        )
