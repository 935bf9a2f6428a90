"""Every configuration key, its default and what it may be.

The dataclasses are the schema: `loading.py` fills them from YAML and dotted overrides by reading their
types. Units are in the names.
"""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal


@dataclass(frozen=True)
class Bounds:
    """The closed range of a number; `above` is an open lower end. None leaves that end free."""

    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None

    def allow(self, value: float) -> bool:
        """Is this number inside? (Infinities and NaN never are.)"""
        return (
            abs(value) < float("inf")
            and (self.minimum is None or value >= self.minimum)
            and (self.maximum is None or value <= self.maximum)
            and (self.above is None or value > self.above)
        )

    def __str__(self) -> str:
        ends = [(">=", self.minimum), (">", self.above), ("<=", self.maximum)]
        return " and ".join(f"{sign} {end}" for sign, end in ends if end is not None)


@dataclass(frozen=True)
class OrOwn:
    """One of these names, or what `own` stands for of the user's own."""

    names: tuple[str, ...]
    own: str = "package.module:function"

    def allow(self, value: str) -> bool:
        """Is it one of the names, or could it be the user's own?"""
        module, _, function = value.partition(":")
        return value in self.names or bool(module and function)

    def __str__(self) -> str:
        return f"one of {', '.join(self.names)}, or {self.own}"


Count = Annotated[int, Bounds(minimum=1, maximum=10**9)]
Rounds = Annotated[int, Bounds(minimum=1, maximum=100_000)]
Passes = Annotated[int, Bounds(minimum=1, maximum=10_000)]
NonNegative = Annotated[float, Bounds(minimum=0)]
Positive = Annotated[float, Bounds(above=0)]
Share = Annotated[float, Bounds(above=0, maximum=1)]
Fraction = Annotated[float, Bounds(minimum=0, maximum=0.99)]


@dataclass(kw_only=True)
class Clients:
    """The federation: who trains, how long and in what batches."""

    count: Count = 4
    """m, the number of clients; independent of the number of ranks that host them"""
    participation: Share = 1.0
    """ceil(participation * count) clients, drawn from the seed, train in each round"""
    local_epochs: Passes = 1
    """passes of a client over its own data in one round"""
    batch_size: Count = 64
    """B; the last batch of a pass may be short"""
    on_loss: Literal["fail", "drop"] = "fail"
    """when a client rank is lost: fail ends the run; drop goes on without its clients (not under torchrun)"""
    minimum: Count = 1
    """with `on_loss: drop`, fewer clients than these end the run"""


@dataclass(kw_only=True)
class Data:
    """The dataset and how its training samples are divided among the clients."""

    name: Annotated[str, OrOwn(("digits", "synthetic", "cifar10", "cifar100", "mnist", "fashion_mnist"))] = (
        "digits"
    )
    """package.module:function of the user's own is called with root and train, a bool; package.module:Class
    may be their own subclass of `fslsage_rpc.tasks.Task`"""
    arguments: dict[str, Any] = field(default_factory=dict)
    """further arguments of the user's own function or class"""
    root: str = "data"
    """the folder that holds (or will hold) the files; digits needs none"""
    download: bool = True
    """fetch what is missing from `root`"""
    partition: Literal["iid", "dirichlet", "shards", "file"] = "dirichlet"
    alpha: Positive = 1.0
    """concentration of the Dirichlet partition: small is skewed"""
    shards: Count = 2
    """label-sorted shards per client, for `partition: shards`"""
    partition_file: str | None = None
    """JSON file for `partition: file`: one list of training-sample indices per client"""
    train_limit: Count | None = None
    """use only the first so many training samples"""
    test_limit: Count | None = None
    """use only the first so many test samples"""
    augment: bool = True
    """random crops (and flips, where mirror images make sense) of the training images"""


@dataclass(kw_only=True)
class Auxiliary:
    """The auxiliary model; with all keys null, the model's own default for its cut."""

    kind: Annotated[str, OrOwn(("copy", "linear", "mlp"))] | None = None
    """copy: fresh first layers of the server half and a linear classifier; linear: the classifier alone;
    mlp: the classifier with a hidden layer before it; package.module:function of the user's own is called
    with smashed_shape and num_classes"""
    arguments: dict[str, Any] = field(default_factory=dict)
    """further arguments of the user's own function"""
    until: str | None = None
    """the module that a copy ends with, as layer3 or layer3.0"""
    width: Count | None = None
    """hidden units of an mlp"""
    width_multiplier: Share | None = None
    """the share of its channels that each layer of a copy keeps; null: all"""


@dataclass(kw_only=True)
class Model:
    """The model, the layer it is cut at, and the auxiliary model."""

    name: str = "simple_conv"
    """simple_conv, resnet18, resnet56, resnet110, torchvision/MODEL (a classifier of torchvision), or
    package.module:function (of the user's own, called with num_classes and perhaps image_shape)"""
    arguments: dict[str, Any] = field(default_factory=dict)
    """further arguments of the function: of resnet56 and resnet110 width, the channels of the first stage"""
    cut: str | None = None
    """the module whose output is the smashed data; null takes the default of a built-in model"""
    memory_format: Literal["auto", "contiguous", "channels_last"] = "auto"
    """of images inside; channels_last: a pixel's channels together; auto: on a CPU the faster, by timing"""
    auxiliary: Auxiliary = field(default_factory=Auxiliary)


@dataclass(kw_only=True)
class AlignmentKeys:
    """How the auxiliary model of a client is fitted to the true cut-layer gradients."""

    epochs: Count = 100
    """passes over the alignment buffer"""
    batch_size: Count = 1000
    buffer_size: Count = 1000
    """newest samples kept per client"""
    tolerance: Share | None = None
    """stop when a pass lowers the objective by less than this share of it; null: make all passes"""
    lag: Annotated[int, Bounds(minimum=0)] = 0
    """r: clients go on while the server fits, and take the fitted model up r rounds later, with r <
    align_every; 0: they wait"""
    solver: Literal["optimizer", "lbfgs"] = "optimizer"
    """`lbfgs` takes the whole buffer at once, on at most `epochs` passes; for a linear auxiliary model"""


@dataclass(kw_only=True)
class AlgorithmKeys:
    """The algorithm and the keys that some of them use."""

    name: Annotated[
        str,
        OrOwn(("fsl_sage", "splitfed_v1", "splitfed_v2", "cse_fsl", "fedavg"), own="package.module:Class"),
    ] = "fsl_sage"
    """package.module:Class is the user's own subclass of `fslsage_rpc.algorithms.Algorithm`"""
    arguments: dict[str, Any] = field(default_factory=dict)
    """arguments of the user's own class, besides keys and federation"""
    upload_every: Count = 5
    """q: smashed data goes up at local steps 0, q, 2q, ..."""
    align_every: Count | None = 10
    """l: alignment in rounds 2, l + 2, 2l + 2, ... (`start: paper`: each one earlier); null = never"""
    average_auxiliary: Literal["never", "alignment", "round"] = "alignment"
    start: Literal["paper", "warm_start"] = "warm_start"
    """warm_start: in the first round clients step on their auxiliary models' own loss, as in CSE-FSL, and the
    server fits from the average of the trained ones; paper: they are aligned at their first step, on the one
    batch that is there"""
    alignment: AlignmentKeys = field(default_factory=AlignmentKeys)
    measure_drift: bool = True
    """compare estimate and true gradient on every upload (server work of its own, timed apart)"""


@dataclass(kw_only=True)
class AggregationKeys:
    """How the average of a round becomes the next global weights."""

    name: Annotated[str, OrOwn(("mean", "momentum", "adam", "yogi"), own="package.module:Class")] = "mean"
    """the mean itself, or a server optimizer (arXiv 2003.00295) that steps towards it; package.module:Class
    is the user's own subclass of `fslsage_rpc.parties.aggregation.Aggregation`"""
    arguments: dict[str, Any] = field(default_factory=dict)
    """of momentum {lr: 1, momentum: 0.9}; of adam and yogi {lr: 0.01, beta1: 0.9, beta2: 0.99, tau: 0.001}"""


@dataclass(kw_only=True)
class SchedulerKeys:
    """The course of a learning rate: one of torch.optim.lr_scheduler, or a linear warm-up and decay."""

    name: (
        Literal[
            "StepLR",
            "MultiStepLR",
            "ConstantLR",
            "LinearLR",
            "ExponentialLR",
            "PolynomialLR",
            "CosineAnnealingLR",
            "CosineAnnealingWarmRestarts",
            "CyclicLR",
            "LinearWarmupDecay",
        ]
        | None
    ) = None
    """torch's name; null: the learning rate stays as it is; LinearWarmupDecay is up from 0 in a line, then
    down to 0"""
    arguments: dict[str, float | str | list[float]] = field(default_factory=dict)
    """torch's arguments, as in {T_max: 200}; of LinearWarmupDecay {warmup: 500, total: 10000}"""
    per: Literal["round", "step"] = "round"
    """it moves on at the end of every round (absent clients' too), or with every step of its optimizer"""


@dataclass(kw_only=True)
class OptimizerKeys:
    """One optimizer of torch.optim."""

    name: Literal["adam", "adamw", "sgd"] = "adam"
    lr: NonNegative = 1e-3
    weight_decay: NonNegative = 0.0
    scheduler: SchedulerKeys = field(default_factory=SchedulerKeys)


@dataclass(kw_only=True)
class Optimizers:
    """The optimizers of the three models; each client, replica and auxiliary model has its own state."""

    client: OptimizerKeys = field(default_factory=lambda: OptimizerKeys(weight_decay=1e-4))
    server: OptimizerKeys = field(default_factory=lambda: OptimizerKeys(weight_decay=1e-4))
    auxiliary: OptimizerKeys = field(default_factory=OptimizerKeys)


@dataclass(kw_only=True)
class LossKeys:
    """The cross-entropy that clients, server and auxiliary models train on."""

    label_smoothing: Fraction = 0.0
    """the share of each label that is spread over all classes; evaluation has none"""


@dataclass(kw_only=True)
class ServerKeys:
    """The server rank."""

    order: Literal["arrival", "round_robin", "client_major"] = "round_robin"
    """which request the server takes next; with the last two, timing never changes the numbers"""


@dataclass(kw_only=True)
class CodecKeys:
    """A codec; its name alone stands for it without arguments, as in `comm.codec.smashed=int8`."""

    name: Annotated[str, OrOwn(("none", "bf16", "int8", "topk", "gaussian"), own="package.module:Class")] = (
        "none"
    )
    """package.module:Class is the user's own subclass of `fslsage_rpc.parties.codecs.Codec`"""
    arguments: dict[str, Any] = field(default_factory=dict)
    """of the codec, as {share: 0.1} of topk"""


@dataclass(kw_only=True)
class CodecsKeys:
    """How each kind of tensor travels between clients and server."""

    smashed: CodecKeys = field(default_factory=CodecKeys)
    gradient: CodecKeys = field(default_factory=CodecKeys)
    """true cut-layer gradients"""
    auxiliary: CodecKeys = field(default_factory=CodecKeys)
    """the change of an auxiliary model that the server fits"""


@dataclass(kw_only=True)
class Comm:
    """Transport, averaging and what to do when a rank is silent."""

    averaging: Literal["auto", "gloo", "nccl"] = "auto"
    """auto: NCCL where every client rank has a GPU of its own, else Gloo"""
    upload_window: Count = 4
    """uploads of one client that the server may still have to train on"""
    codec: CodecsKeys = field(default_factory=CodecsKeys)
    interface: str | None = None
    """network interface for RPC, Gloo and NCCL; null: loopback on one host, else the libraries' own choice"""
    transports: list[Literal["uv", "shm", "ibv"]] | None = None
    """TensorPipe transports; null: [uv] where cores are few (shm busy-polls), else TensorPipe's own choice"""
    channels: (
        list[Literal["cma", "mpt_uv", "basic", "cuda_xth", "cuda_ipc", "cuda_gdr", "cuda_basic"]] | None
    ) = None
    """TensorPipe channels, best first; null: cma, mpt_uv and basic; with device maps cuda_xth and cuda_basic,
    too, and cuda_ipc where the ranks of each host see the same GPUs"""
    device_maps: Literal["auto", "never"] = "auto"
    """auto: tensors go from a client rank's GPU to the server's and back by RPC device maps, where both have
    one; never: through host memory"""
    timeout_seconds: Annotated[float, Bounds(minimum=5)] = 300.0
    """a rank that gives no sign of life for so long ends the run"""


@dataclass(kw_only=True)
class Checkpoint:
    """What a run that was cut off goes on from."""

    every: Count | None = 1
    """rounds between checkpoints, and one after the last round; null = never"""
    keep: Count = 2
    """the newest so many stay"""


@dataclass(kw_only=True)
class Evaluation:
    """Evaluation of the averaged model on the test set, off the training clock."""

    every: Count = 1
    """rounds between evaluations; the last round is always evaluated"""
    batch_size: Count = 500


@dataclass(kw_only=True)
class Stop:
    """Ends of a run before `rounds`; null = none."""

    paper_gib: Positive | None = None
    """GiB of the paper ledger"""
    accuracy: Share | None = None
    """test accuracy"""
    diverged: bool = True
    """the first round with a loss or a weight that is not finite; exit status 1"""


VariantKeys = dict[str, list[str] | dict[str, list[str]]]
"""see `fslsage_rpc.config.variants`"""


@dataclass(kw_only=True)
class Bench:
    """What `fslsage bench` compares; `train` does not use it. A benchmark runs all its rounds, whatever
    `stop` says, and writes no trace.
    """

    variants: VariantKeys = field(default_factory=dict)
    """per name the keys that it changes, as on the command line: [algorithm.name=splitfed_v1]; a mapping of
    such lists is a choice, and a name as `iid x algorithm` builds on others"""
    reference: str = "splitfed_v1"
    """the variant whose time the others' are divided by"""
    repeats: Count = 2
    """every variant is run so often; every second time in reverse order"""
    warmup_rounds: Annotated[int, Bounds(minimum=0)] = 1
    """rounds left out at the start of each run; to whole alignment intervals"""
    target_accuracy: Share | None = None
    """test accuracy to which seconds and bytes are counted"""


@dataclass(kw_only=True)
class Sweep:
    """What `fslsage sweep` trains: every variant with every seed, each a run in output/name; `train` does not
    use it.
    """

    variants: VariantKeys = field(default_factory=dict)
    """as those of `bench`; here they may change what processes share, too, but not the seed"""
    seeds: list[int] = field(default_factory=lambda: [0])
    reference: str | None = None
    """the variant, or one of a choice, to which differences are given, paired by seed; null: none"""
    target_accuracy: Share | None = None
    """test accuracy to which seconds and bytes are counted"""


@dataclass(kw_only=True)
class Config:
    """One run, complete."""

    name: Annotated[str, "a folder name of letters, digits, '.', '_' and '-'"] = "run"
    """the run's folder is output/name"""
    seed: Annotated[int, Bounds(minimum=0, maximum=2**32 - 1)] = 0
    rounds: Rounds = 20
    ranks: Annotated[int, Bounds(minimum=2)] = 3
    """ranks that the self-launching form starts: the server and ranks - 1 client ranks"""
    transport: Literal["rpc", "local"] = "rpc"
    """local: everything in one process, without torch.distributed"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["fp32", "bf16", "fp64"] = "fp32"
    """bf16: layers compute by autocast, smashed data and gradients travel so; weights and losses are fp32"""
    tf32: bool = False
    """GPUs may round the factors of fp32 products to TF32: faster, about three decimal digits"""
    graphs: Literal["never", "auto"] = "never"
    """auto: on a GPU the steps of clients, server and alignment are captured as CUDA graphs, with fallback"""
    output: str = "runs"
    resume: Literal["auto", "never"] = "auto"
    """auto: a run goes on from its last checkpoint, and a complete one is shown; never: it is replaced"""
    clients: Clients = field(default_factory=Clients)
    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    algorithm: AlgorithmKeys = field(default_factory=AlgorithmKeys)
    aggregation: AggregationKeys = field(default_factory=AggregationKeys)
    optimizer: Optimizers = field(default_factory=Optimizers)
    loss: LossKeys = field(default_factory=LossKeys)
    server: ServerKeys = field(default_factory=ServerKeys)
    comm: Comm = field(default_factory=Comm)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    evaluation: Evaluation = field(default_factory=Evaluation)
    trace: bool = False
    """write trace.json, a Chrome trace of all ranks"""
    stop: Stop = field(default_factory=Stop)
    bench: Bench = field(default_factory=Bench)
    sweep: Sweep = field(default_factory=Sweep)
