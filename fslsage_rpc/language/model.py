"""GPT-2 of the transformers library as a line of modules, to be cut behind any block, with LoRA of peft.

Both libraries are in the `llm` extra, and are imported when a model is made.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from fslsage_rpc.config.own import checked_arguments, first_line
from fslsage_rpc.config.schema import Bounds, Count, Fraction, Positive
from fslsage_rpc.errors import HostError, InputError
from fslsage_rpc.language import hub
from fslsage_rpc.models.zoo import ModelEntry

DIFFERENTIABLE_ATTENTION = "twice_differentiable"
ADAPTED = r".*\.c_attn\.(q|v)"
"""the projections that get adapters"""


class Embedding(nn.Module):
    """Tokens `[B, T]` to hidden states `[B, T, D]`: their embedding and that of their position."""

    def __init__(self, wte: nn.Embedding, wpe: nn.Embedding, drop: nn.Module):
        super().__init__()
        self.wte, self.wpe, self.drop = wte, wpe, drop

    def forward(self, tokens: Tensor) -> Tensor:
        """See the class."""
        # Made of the tokens, so that no cut comes between the two embeddings: the length of texts would be a
        # constant behind it, and generation begins with short ones.
        positions = torch.ones_like(tokens[:1]).cumsum(1) - 1  # [1, T]
        hidden: Tensor = self.drop(self.wte(tokens) + self.wpe(positions))
        return hidden


class QueryKeyValue(nn.Module):
    """GPT-2's one projection to queries, keys and values as three, so that each can have an adapter."""

    def __init__(self, joint: Any, width: int):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        weights, biases = joint.weight.detach().split(width, dim=1), joint.bias.detach().split(width)
        for linear, weight, bias in zip((self.q, self.k, self.v), weights, biases, strict=True):
            linear.weight = nn.Parameter(weight.T.contiguous())
            linear.bias = nn.Parameter(bias.clone())

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden states `[B, T, D]` to `[B, T, 3 D]`."""
        return torch.cat((self.q(hidden), self.k(hidden), self.v(hidden)), dim=-1)


class Gpt2(nn.Module):
    """Tokens `[B, T]` to logits `[B, T, vocabulary]` of the token that follows each.

    Attention is causal, so what is behind a text, as padding, changes nothing before it: no mask is needed.
    Unlike in the original, the head's weights are not those of the embedding, which is on the other side of
    the cut; they start equal.
    """

    def __init__(self, original: Any):
        super().__init__()
        self.embedding = Embedding(original.wte, original.wpe, original.drop)
        self.h = original.h
        self.ln_f = original.ln_f
        vocabulary, width = original.wte.weight.shape
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        self.lm_head.weight = nn.Parameter(original.wte.weight.detach().clone())

    def forward(self, tokens: Tensor) -> Tensor:
        """See the class."""
        hidden = self.embedding(tokens)
        for block in self.h:
            hidden = block(hidden)
        logits: Tensor = self.lm_head(self.ln_f(hidden))
        return logits


def make(
    num_classes: int,
    sample_shape: Sequence[int],
    width: Count | None = None,
    layers: Annotated[int, Bounds(minimum=1, maximum=1_000)] | None = None,
    heads: Count | None = None,
    dropout: Fraction = 0.0,
    pretrained: str | None = None,
    lora: dict[str, Any] | None = None,
) -> Gpt2:
    """A GPT-2, randomly initialised or pretrained, with adapters where `lora` asks for them.

    Args:
        num_classes: the size of the vocabulary.
        width: of hidden states; None: 768.
        layers: the number of blocks; None: 12.
        heads: of attention; None: 12.
        dropout: behind the embeddings and at the end of each residual branch.
        pretrained: weights and sizes: a folder, or a name on the Hugging Face hub; None: random weights.
        lora: arguments of `adapt`.

    Raises:
        InputError: the sizes do not fit, the weights are not to be had, or the extra is not installed.
    """
    transformers = import_extra("transformers")
    (length,) = sample_shape
    if pretrained is None:
        config = transformers.GPT2Config(
            vocab_size=num_classes,
            n_positions=length,
            n_embd=width or 768,
            n_layer=layers or 12,
            n_head=heads or 12,
            bos_token_id=None,
            eos_token_id=None,
        )
        if config.n_embd % config.n_head:
            raise InputError(
                f"model.arguments.heads: got {config.n_head}, expected a divisor of {config.n_embd}"
            )
    else:
        for key, value in {"width": width, "layers": layers, "heads": heads}.items():
            if value is not None:
                raise InputError(
                    f"model.arguments.{key}: got {value}, expected null: the pretrained model has its own"
                )
        config = _load(transformers.GPT2Config.from_pretrained, pretrained)
        if config.vocab_size != num_classes or config.n_positions < length:
            raise InputError(
                f"model.arguments.pretrained: got {pretrained!r}, for {config.vocab_size} tokens and texts "
                f"of {config.n_positions}, expected {num_classes} (data.arguments.vocabulary) and {length} "
                "(data.arguments.tokens)"
            )
    config.embd_pdrop = config.resid_pdrop = dropout
    config.attn_pdrop = 0.0
    config._attn_implementation = "sdpa"
    if pretrained is None or torch.empty(0).is_meta:  # on the meta device only shapes are asked for
        model = Gpt2(transformers.GPT2Model(config))
    else:
        model = Gpt2(_load(_weights_of, pretrained, config=config))
    adapt(model, **checked_arguments("model.arguments.lora", "lora", adapt, lora or {}, first=1))
    return model


def _weights_of(name: str, **keys: Any) -> Any:
    """transformers' GPT-2 with all of these weights; it would itself make up those that are not there."""
    transformers = import_extra("transformers")
    model, found = transformers.GPT2Model.from_pretrained(name, output_loading_info=True, **keys)
    missing = sorted(found["missing_keys"])
    if missing:
        raise ValueError(f"{len(missing)} weights are not there, as {missing[0]}")
    return model


@contextmanager
def _silent() -> Iterator[None]:
    """Without the progress bars and tables with which transformers loads weights, on every rank."""
    logging = import_extra("transformers").utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _load(load: Callable[..., Any], name: str, **keys: Any) -> Any:
    try:
        with _silent():
            return hub.load(load, name, **keys)
    except Exception as error:  # the hub, the file system, a file that is something else
        raise HostError(
            f"model.arguments.pretrained: got {name!r}, which cannot be loaded ({first_line(error)}); "
            "expected a folder with GPT-2's config.json and weights, or a name on the Hugging Face hub"
        ) from None


def adapt(
    model: Gpt2,
    rank: Count | None = None,
    alpha: Positive = 32.0,
    dropout: Fraction = 0.0,
    frozen: bool = True,
) -> None:
    """Add low-rank adapters (arXiv 2106.09685) to the query and value projections.

    Args:
        rank: of the adapters; None for none of them.
        alpha: adapters are scaled by alpha / rank.
        dropout: of what goes into the adapters.
        frozen: nothing else trains.
    """
    if rank is None:
        return
    peft = import_extra("peft")
    for block in model.h:
        block.attn.c_attn = QueryKeyValue(block.attn.c_attn, model.lm_head.in_features)
    keys = peft.LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=ADAPTED, bias="none"
    )
    peft.inject_adapter_in_model(keys, model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "lora_" in name or not frozen


def third_block_behind(cut: str) -> str | None:
    """An auxiliary model has three blocks, as in the FSL-SAGE paper."""
    name, _, number = cut.partition(".")
    return f"h.{int(number) + 3}" if name == "h" and number.isdecimal() else None


def attend_in_single_steps(auxiliary: nn.Module) -> None:
    """torch's fused attention cannot be differentiated twice."""
    interface = import_extra("transformers").AttentionInterface
    interface.register(DIFFERENTIABLE_ATTENTION, _causal_attention)
    for module in auxiliary.modules():
        if hasattr(module, "config"):  # one for all blocks of this copy
            config: Any = module.config
            config._attn_implementation = DIFFERENTIABLE_ATTENTION


def _causal_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    scaling: float,
    **others: Any,
) -> tuple[Tensor, None]:
    """softmax(Q K^T scaling + causal mask) V, of `[B, heads, T, d]`, as `[B, T, heads, d]`."""
    scores = query @ key.transpose(-1, -2) * scaling
    later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
    weights = scores.masked_fill(later, -torch.inf).softmax(-1)
    return (weights @ value).transpose(1, 2), None


def import_extra(name: str) -> Any:
    """A library of the `llm` extra.

    Raises:
        InputError: it is not installed.
    """
    try:
        return import_module(name)
    except ImportError:
        raise InputError(f"model.name: GPT-2 needs {name}: pip install 'fslsage_rpc[llm]'") from None


gpt2 = ModelEntry(
    make,
    default_cut="h.0",
    auxiliary=third_block_behind,
    samples="texts",
    pools=False,
    head=("ln_f", "lm_head"),
    for_alignment=attend_in_single_steps,
    on_meta=True,
)
