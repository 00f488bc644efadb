"""The one Transformer: engine and trainer call the same forward, which does not know who calls it.

What it computes with are the `Ops` of its device. Weights lie in packed storage whose addresses never change. A Hugging
Face tensor is a range of rows of a packed matrix (q, k and v are rows of one; so are gate and up) or of a vector. A
trainer's model has float32 masters beside the packed storage, to which gradients flow; `repack` brings the packed
storage up to date with them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from engine.attention import Attention
from engine.model_config import ModelConfig
from engine.ops import Ops, make_ops
from kernels.attention import check_attention_shape
from kernels.checksum import combine_digests, digest_and_scan
from kernels.rotary import rotary_table

NamedTensors = Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]]

EMBEDDING, LM_HEAD, FINAL_NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


class PackedLinear(nn.Module):
    """A matrix [N, K] in packed storage; with a master where it is trained and a bias where the model has one."""

    def __init__(
        self,
        num_outputs: int,
        num_inputs: int,
        ops: Ops,
        *,
        has_bias: bool = False,
        with_master: bool,
        into_residual: bool = False,
    ) -> None:
        super().__init__()
        self.num_outputs, self.num_inputs = num_outputs, num_inputs
        self.ops, self.into_residual = ops, into_residual
        self.register_buffer("packed", ops.new_matrix(num_outputs, num_inputs), persistent=False)
        shape, device = (num_outputs, num_inputs), ops.device
        self.master = nn.Parameter(torch.empty(shape, device=device)) if with_master else None
        bias = torch.zeros(num_outputs, device=device) if has_bias else None
        self.bias = nn.Parameter(bias, requires_grad=with_master) if has_bias else None

    def forward(self, x_TK: torch.Tensor) -> torch.Tensor:
        return self.ops.linear(x_TK, self.packed, self.num_outputs, self.bias, self.master, self.into_residual)

    def embed(self, ids_T: torch.Tensor) -> torch.Tensor:
        """Rows of the matrix, [T, K]."""
        return self.ops.embedding(ids_T, self.packed, self.master)

    @torch.no_grad()
    def write_rows(self, rows_NK: torch.Tensor, first_row: int) -> None:
        self.ops.write_rows(self.packed, rows_NK, first_row)
        if self.master is not None:
            self.master[first_row : first_row + rows_NK.shape[0]].copy_(rows_NK)

    @torch.no_grad()
    def read_rows(self, first_row: int, num_rows: int) -> torch.Tensor:
        if self.master is not None:
            return self.master[first_row : first_row + num_rows]
        return self.ops.read_rows(self.packed, first_row, num_rows)

    @torch.no_grad()
    def repack(self) -> None:
        if self.master is not None:
            self.ops.write_rows(self.packed, self.master, 0)


class RMSNorm(nn.Module):
    """The weight and epsilon of a norm; also of the fused form that adds to the residual stream first."""

    def __init__(self, width: int, eps: float, ops: Ops, *, trainable: bool) -> None:
        super().__init__()
        self.eps, self.ops = eps, ops
        self.weight = nn.Parameter(torch.ones(width, device=ops.device), requires_grad=trainable)

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        return self.ops.rms_norm(x_TD, self.weight, self.eps)

    def add(self, x_TD: torch.Tensor, delta_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(x + delta, its norm)."""
        return self.ops.add_rms_norm(x_TD, delta_TD, self.weight, self.eps)


class SelfAttention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int, ops: Ops, *, with_masters: bool) -> None:
        super().__init__()
        self.layer, self.config, self.ops = layer, config, ops
        self.has_rope = config.has_rope(layer)
        assert self.has_rope or not config.has_qk_norm, "heads are normed by the op that turns them"
        num_qkv = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        self.qkv = PackedLinear(
            num_qkv, config.hidden_size, ops, has_bias=config.attention_bias, with_master=with_masters
        )
        self.output = PackedLinear(
            config.hidden_size, config.num_heads * config.head_dim, ops,
            has_bias=config.attention_output_bias, with_master=with_masters, into_residual=True,
        )  # fmt: skip
        if config.has_qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps, ops, trainable=with_masters)
            self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps, ops, trainable=with_masters)

    def forward(
        self, x_TD: torch.Tensor, positions: torch.Tensor, table: torch.Tensor, attention: Attention
    ) -> torch.Tensor:
        N, K, H = self.config.num_heads, self.config.num_kv_heads, self.config.head_dim
        qkv_TXH = self.qkv(x_TD).view(-1, N + 2 * K, H)
        qk_TXH, v_TKH = qkv_TXH[:, : N + K], qkv_TXH[:, N + K :]
        if self.has_rope:
            norms = (self.q_norm.weight, self.k_norm.weight) if self.config.has_qk_norm else None
            qk_TXH = self.ops.rotary(qk_TXH, positions, table, norms, N, self.config.rms_norm_eps)
        out_TNH = attention(self.layer, qk_TXH[:, :N], qk_TXH[:, N:], v_TKH, self.config.window_of(self.layer))
        return self.output(out_TNH.view(-1, N * H))


class FeedForward(nn.Module):
    def __init__(self, config: ModelConfig, ops: Ops, *, with_masters: bool) -> None:
        super().__init__()
        self.ops, (D, F) = ops, (config.hidden_size, config.intermediate_size)
        self.gate_up = PackedLinear(2 * F, D, ops, with_master=with_masters)
        self.down = PackedLinear(D, F, ops, with_master=with_masters, into_residual=True)

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        return self.down(self.ops.silu_and_mul(self.gate_up(x_TD)))


class DecoderLayer(nn.Module):
    def __init__(self, config: ModelConfig, layer: int, ops: Ops, *, with_masters: bool) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, ops, trainable=with_masters)
        self.attention = SelfAttention(config, layer, ops, with_masters=with_masters)
        self.feed_forward_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, ops, trainable=with_masters)
        self.feed_forward = FeedForward(config, ops, with_masters=with_masters)

    def forward(
        self,
        residual_TD: torch.Tensor,
        delta_TD: torch.Tensor | None,
        positions: torch.Tensor,
        table: torch.Tensor,
        attention: Attention,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(residual stream, what the feed-forward layer adds to it); the sum is taken by the next norm."""
        if delta_TD is None:
            normed_TD = self.attention_norm(residual_TD)
        else:
            residual_TD, normed_TD = self.attention_norm.add(residual_TD, delta_TD)
        delta_TD = self.attention(normed_TD, positions, table, attention)
        residual_TD, normed_TD = self.feed_forward_norm.add(residual_TD, delta_TD)
        return residual_TD, self.feed_forward(normed_TD)


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightSlot:
    """Where a Hugging Face tensor lives: rows of a packed matrix, or a range of a vector."""

    shape: tuple[int, ...]
    module: nn.Module  # a PackedLinear, where the tensor is rows of its matrix
    vector: str | None = None  # else the name of the module's vector
    first_row: int = 0

    @property
    def parameter(self) -> nn.Parameter | None:
        """The float32 parameter that holds the tensor, as the module has it now; None for a matrix without a master."""
        return self.module.master if self.vector is None else getattr(self.module, self.vector)

    @property
    def rows(self) -> slice:
        return slice(self.first_row, self.first_row + self.shape[0])

    def write(self, tensor: torch.Tensor) -> None:
        if self.vector is None:
            self.module.write_rows(tensor, self.first_row)
        else:
            self.parameter.data[self.rows].copy_(tensor)

    def read(self) -> torch.Tensor:
        if self.vector is None:
            return self.module.read_rows(self.first_row, self.shape[0])
        return self.parameter.data[self.rows]


class Transformer(nn.Module):
    """A dense decoder (Llama, SmolLM, Mistral, Qwen2, Qwen3), as its config describes it (docs/models.md).

    numerics: name of the profile, which fixes the type of the packed matrices and how products with them are summed.
    with_masters: float32 parameters [N, K] beside the packed storage, for a trainer; without, nothing takes gradients.
    ops: those to use, instead of the profile's own on the CPU. layer_type: what its layers are made of.
    Raises ValueError for sizes that the kernels do not take.
    """

    def __init__(
        self,
        config: ModelConfig,
        numerics: str = "float32",
        *,
        with_masters: bool = False,
        ops: Ops | None = None,
        layer_type: type[DecoderLayer] = DecoderLayer,
    ) -> None:
        super().__init__()
        check_attention_shape(config.head_dim, block_size=16)
        ops = make_ops(numerics) if ops is None else ops
        self.config, self.ops, self.profile = config, ops, ops.profile
        self.embedding = PackedLinear(config.vocab_size, config.hidden_size, ops, with_master=with_masters)
        self.layers = nn.ModuleList(
            layer_type(config, layer, ops, with_masters=with_masters) for layer in range(config.num_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, ops, trainable=with_masters)
        self.lm_head = (
            self.embedding
            if config.tie_word_embeddings
            else PackedLinear(config.vocab_size, config.hidden_size, ops, with_master=with_masters)
        )
        table = rotary_table(config.max_position_embeddings, config.head_dim, config.rope_theta, config.rope_scaling)
        self.register_buffer("rotary_table", table.to(ops.device), persistent=False)
        self.slots: dict[str, WeightSlot] = dict(_weight_slots(self))  # by Hugging Face name

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor, attention: Attention) -> torch.Tensor:
        """Hidden states [T, D] after the final norm, never logits; input_ids [T] int64, positions [T] integers."""
        positions = positions.to(torch.int64)
        residual_TD, delta_TD = self.embedding.embed(input_ids), None
        for layer in self.layers:
            residual_TD, delta_TD = layer(residual_TD, delta_TD, positions, self.rotary_table, attention)
        return self.norm.add(residual_TD, delta_TD)[1]

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every weight under its Hugging Face name: what `load_weights` must be given."""
        return {name: slot.shape for name, slot in self.slots.items()}

    def named_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(Hugging Face name, float32 tensor): views of the masters in a trainer, copies out of packed storage else."""
        for name, slot in self.slots.items():
            yield name, slot.read().detach()

    def load_weights(self, named_tensors: NamedTensors, digests: Mapping[str, bytes] | None = None) -> bytes:
        """Replaces every weight in place and returns the 16-byte checksum of the new ones.

        named_tensors: a mapping or one-shot iterator of (Hugging Face name, floating-point tensor), complete. A tied
        model takes `lm_head.weight` too, if it equals the embedding.
        digests: by name, from `kernels.checksum`, of float32 tensors that the caller has verified and found finite;
        those are not read a second time.

        Raises:
            ValueError: for a name that is missing, unknown or given twice, a wrong shape, NaN or infinity. Nothing is
                written then.
        """
        staged, checksum = self.stage_weights(named_tensors, digests)
        for name, tensor in staged.items():
            self.slots[name].write(tensor)
        return checksum

    def stage_weights(
        self, named_tensors: NamedTensors, digests: Mapping[str, bytes] | None = None
    ) -> tuple[dict[str, torch.Tensor], bytes]:
        """What `load_weights` would write, complete and checked as there, by name; and its checksum."""
        staged = self._stage(named_tensors)
        checksum = self._verify(staged, digests or {})
        return {name: tensor.detach() for name, tensor in staged.items() if name in self.slots}, checksum

    def repack(self) -> None:
        """Brings the packed storage up to date with the masters, after an optimiser step."""
        for module in self.modules():
            if isinstance(module, PackedLinear):
                module.repack()

    def _stage(self, named_tensors: NamedTensors) -> dict[str, torch.Tensor]:
        pairs = named_tensors.items() if isinstance(named_tensors, Mapping) else named_tensors
        staged: dict[str, torch.Tensor] = {}
        for name, tensor in pairs:
            if name in staged:
                raise ValueError(f"weight {name!r} was given twice")
            if not name.endswith(".rotary_emb.inv_freq"):  # derived from the config; old checkpoints carry it
                staged[name] = tensor
        unknown = sorted(name for name in staged if name not in self.slots and not self._is_tied_head(name))
        missing = sorted(self.slots.keys() - staged.keys())
        if unknown or missing:
            problems = [
                _name_some(kind, names) for kind, names in (("missing", missing), ("unknown", unknown)) if names
            ]
            raise ValueError(
                f"weights do not fit this {self.config.architecture}: {'; '.join(problems)}. All {len(self.slots)} "
                "are needed, under their Hugging Face names"
            )
        return staged

    def _is_tied_head(self, name: str) -> bool:
        return name == LM_HEAD and self.config.tie_word_embeddings

    def _verify(self, staged: Mapping[str, torch.Tensor], known: Mapping[str, bytes]) -> bytes:
        digests = {}
        for name, tensor in staged.items():
            shape = self.slots[EMBEDDING if self._is_tied_head(name) else name].shape
            if tuple(tensor.shape) != shape or not tensor.is_floating_point():
                raise ValueError(
                    f"weight {name!r} is {tensor.dtype} of shape {tuple(tensor.shape)}; needed: floats of shape {shape}"
                )
            is_known = name in known and tensor.dtype is torch.float32
            digests[name], has_nonfinite = (known[name], False) if is_known else digest_and_scan(_as_float32(tensor))
            if has_nonfinite:
                raise ValueError(f"weight {name!r} holds NaN or infinite values: no weight was changed")
        head = digests.pop(LM_HEAD) if self.config.tie_word_embeddings and LM_HEAD in digests else None
        if head is not None and head != digests[EMBEDDING]:
            raise ValueError(f"tie_word_embeddings is set but {LM_HEAD!r} differs from {EMBEDDING!r}: leave it out")
        return combine_digests(digests)


def _weight_slots(model: Transformer) -> Iterator[tuple[str, WeightSlot]]:
    """The map from Hugging Face names to places in a model."""
    yield EMBEDDING, _matrix(model.embedding)
    for index, layer in enumerate(model.layers):
        prefix = f"model.layers.{index}."
        yield prefix + "input_layernorm.weight", _vector(layer.attention_norm, "weight")
        for name, slot in _attention_slots(layer.attention):
            yield prefix + "self_attn." + name, slot
        yield prefix + "post_attention_layernorm.weight", _vector(layer.feed_forward_norm, "weight")
        width = layer.feed_forward.gate_up.num_outputs // 2
        yield prefix + "mlp.gate_proj.weight", _matrix(layer.feed_forward.gate_up, 0, width)
        yield prefix + "mlp.up_proj.weight", _matrix(layer.feed_forward.gate_up, width, width)
        yield prefix + "mlp.down_proj.weight", _matrix(layer.feed_forward.down)
    yield FINAL_NORM, _vector(model.norm, "weight")
    if model.lm_head is not model.embedding:
        yield LM_HEAD, _matrix(model.lm_head)


def _attention_slots(attention: SelfAttention) -> Iterator[tuple[str, WeightSlot]]:
    config = attention.config
    first_row = 0
    heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads, "v_proj": config.num_kv_heads}
    for name, num_heads in heads.items():
        num_rows = num_heads * config.head_dim
        yield name + ".weight", _matrix(attention.qkv, first_row, num_rows)
        if attention.qkv.bias is not None:
            yield name + ".bias", _vector(attention.qkv, "bias", first_row, num_rows)
        first_row += num_rows
    yield "o_proj.weight", _matrix(attention.output)
    if attention.output.bias is not None:
        yield "o_proj.bias", _vector(attention.output, "bias")
    if config.has_qk_norm:
        yield "q_norm.weight", _vector(attention.q_norm, "weight")
        yield "k_norm.weight", _vector(attention.k_norm, "weight")


def _matrix(matrix: PackedLinear, first_row: int = 0, num_rows: int | None = None) -> WeightSlot:
    shape = (matrix.num_outputs if num_rows is None else num_rows, matrix.num_inputs)
    return WeightSlot(shape=shape, module=matrix, first_row=first_row)


def _vector(module: nn.Module, name: str, first_row: int = 0, num_rows: int | None = None) -> WeightSlot:
    shape = (getattr(module, name).shape[0] if num_rows is None else num_rows,)
    return WeightSlot(shape=shape, module=module, vector=name, first_row=first_row)


def _as_float32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to(device="cpu", dtype=torch.float32).contiguous()


def _name_some(kind: str, names: list[str]) -> str:
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{kind} {', '.join(names[:3])}{rest}"
