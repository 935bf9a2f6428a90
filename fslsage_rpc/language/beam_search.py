"""Texts from a language model, by the beam search of the transformers library."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from fslsage_rpc.language.model import import_extra

NextLogits = Callable[[Tensor], Tensor]
"""from the first tokens of texts `[B, t]` to the logits `[B, classes]` of each one's next token"""


def write_on(
    next_logits: NextLogits, begun: Tensor, classes: int, end: int, longest: int, beams: int
) -> list[list[int]]:
    """What the likeliest texts that begin like this go on with.

    Every step computes the whole text again: nothing of earlier steps is kept on either side of a cut.

    Args:
        begun: tokens `[B, t]`.
        end: the token that ends a text.
        longest: the most tokens of a whole text.

    Returns:
        Per text its new tokens, without the end.
    """
    transformers = import_extra("transformers")
    keys = transformers.GenerationConfig(
        num_beams=beams,
        do_sample=False,
        max_length=longest,
        eos_token_id=end,
        pad_token_id=end,
        use_cache=False,
    )
    model = _writer()(transformers.PretrainedConfig(vocab_size=classes), next_logits)
    with torch.no_grad():
        texts = model.generate(
            begun, attention_mask=torch.ones_like(begun), generation_config=keys
        )  # [B, <= longest]
    new = texts[:, begun.shape[1] :].tolist()
    return [tokens[: tokens.index(end)] if end in tokens else tokens for tokens in new]


@cache
def _writer() -> Any:
    """A model as `generate` wants it: a class of the library, made when it is needed."""
    transformers: Any = import_extra("transformers")
    outputs = import_extra("transformers.modeling_outputs")

    class Writer(transformers.PreTrainedModel, transformers.GenerationMixin):
        config_class = transformers.PretrainedConfig
        main_input_name = "input_ids"

        def __init__(self, config: Any, next_logits: NextLogits):
            super().__init__(config)
            self.on_cpu = nn.Parameter(torch.empty(0))  # where the search itself is done
            self._next_logits = next_logits

        def forward(self, input_ids: Tensor, **others: Any) -> Any:
            return outputs.CausalLMOutput(logits=self._next_logits(input_ids)[:, None])

        def prepare_inputs_for_generation(
            self, input_ids: Tensor, attention_mask: Tensor | None = None, **others: Any
        ) -> dict[str, Tensor]:
            return {"input_ids": input_ids}

    return Writer
