"""What users' scripts do with a GPU: each of these once failed on the virtual one."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.nn.attention.flex_attention import flex_attention

import every_byte

OPTIMIZERS = (
    *("SGD", "Adam", "AdamW", "NAdam", "RAdam", "Adamax", "Adagrad", "Adadelta", "RMSprop"),
    *("Rprop", "ASGD", "Adafactor", "Muon", "LBFGS"),
)


@pytest.fixture(name="gpu")
def one_card() -> Any:
    with every_byte.as_cuda("RTX 4090") as gpu:
        yield gpu


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", requires_grad=True)


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")  # LBFGS of 2.8
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_optimizer_takes_two_steps(gpu: every_byte.VirtualGPU, name: str) -> None:
    if not hasattr(torch.optim, name):
        pytest.skip(f"PyTorch {torch.__version__} has no {name}")
    model = nn.Linear(64, 64, bias=False).cuda()
    optimizer = getattr(torch.optim, name)(model.parameters(), lr=1e-3)
    x = torch.randn(4, 64, device="cuda")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(x).sum()
        loss.backward()
        return loss

    for _ in range(2):
        optimizer.step(closure)
    assert model.weight.grad is not None


@pytest.mark.parametrize("option", ["fused", "capturable", "amsgrad", "foreach"])
def test_adamws_options(gpu: every_byte.VirtualGPU, option: str) -> None:
    model = nn.Linear(64, 64).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), **{option: True})
    model(torch.randn(4, 64, device="cuda")).sum().backward()
    optimizer.step()
    per_parameter = {"fused": 3, "capturable": 3, "amsgrad": 3, "foreach": 2}[option]
    on_card = [
        t for state in optimizer.state.values() for t in state.values() if getattr(t, "is_cuda", 0)
    ]
    assert len(on_card) == 2 * per_parameter


RUN: dict[str, Callable[[], Any]] = {
    "einsum": lambda: (
        torch.einsum("bij,bjk->bik", random(2, 3, 4), random(2, 4, 5)).sum().backward()
    ),
    "one_hot": lambda: F.one_hot(torch.randint(0, 10, (5,), device="cuda")),
    "multinomial": lambda: torch.multinomial(torch.rand(4, 10, device="cuda"), 2),
    "any": lambda: bool(torch.rand(4, 4000, device="cuda").any()),
    "histc": lambda: torch.histc(torch.rand(10, device="cuda"), 5),
    "searchsorted": lambda: torch.searchsorted(
        torch.arange(10.0, device="cuda"), torch.rand(5, device="cuda")
    ),
    "from_numpy": lambda: torch.from_numpy(torch.ones(4).numpy()).to("cuda"),
    "transformer": lambda: (
        nn.Transformer(64, 4, 1, 1, batch_first=True)
        .cuda()(
            random(2, 8, 64),
            random(2, 8, 64),
            tgt_mask=nn.Transformer.generate_square_subsequent_mask(8, device="cuda"),
        )
        .sum()
        .backward()
    ),
    "clip": lambda: nn.utils.clip_grad_norm_([random(9)], 1.0, error_if_nonfinite=True),
    "distribution": lambda: torch.distributions.Normal(random(3000), 1.0).rsample(),
    "vmap": lambda: torch.func.vmap(lambda i, x: (x * i)[0] + torch.ones(3, device="cuda"))(
        torch.arange(2, device="cuda"), random(2, 4, 3)
    ),
    "per-sample gradients": lambda: torch.func.vmap(
        torch.func.grad(lambda w, x: (w * x).sum()), in_dims=(None, 0)
    )(random(3), random(5, 3)),
    "allclose": lambda: 1 / torch.allclose(random(3000), random(3000)),
    "print": lambda: print(random(4, 4)),
}


@pytest.mark.parametrize("name", RUN)
def test_what_scripts_call_runs(gpu: every_byte.VirtualGPU, name: str) -> None:
    RUN[name]()


@pytest.mark.parametrize("where", ["list", "cpu", "cuda"])
def test_lengths_of_ctc_are_read_on_the_host(gpu: every_byte.VirtualGPU, where: str) -> None:
    lengths: list[Any] = [[50] * 4, [7, 8, 9, 7]]
    if where != "list":
        lengths = [torch.tensor(each, device=where) for each in lengths]
    x, targets = random(50, 4, 20), torch.ones(4, 10, dtype=torch.int64)
    held = gpu.memory_allocated()
    loss = F.ctc_loss(x.log_softmax(-1), targets, *lengths)
    kept = 16384 + 15360 + 512 + 512 + 512  # log_softmax, states, targets, losses, their mean
    assert gpu.memory_allocated() <= held + kept + 3 * 512  # the lengths as a divisor
    states = 4 * 50 * (2 * 9 + 1) * 4
    assert gpu.memory_allocated() >= held + x.nbytes + states
    loss.backward()
    assert x.grad is not None and gpu.memory_allocated() <= held + 16384 + 2 * 512


def test_results_that_go_to_the_host_leave_the_card(gpu: every_byte.VirtualGPU) -> None:
    z = torch.randn(2, 100_000)
    x = torch.tensor([1.0, 2.0])
    kept, sizes = [], []
    for i in range(0, 100_000, 10_000):
        part = x.view(2, 1).cuda() * z[:, i : i + 10_000].cuda()
        kept.append(part.max(dim=0)[0].cpu())
        del part
        sizes.append(gpu.memory_allocated())
    assert set(sizes) == {0}


def test_activations_that_are_saved_on_the_host(gpu: every_byte.VirtualGPU) -> None:
    model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(4))).cuda()
    x = torch.randn(1024, 256, device="cuda")
    loss = model(x).sum()
    kept = gpu.memory_allocated()
    del loss
    with torch.autograd.graph.save_on_cpu(pin_memory=True):
        loss = model(x).sum()
    assert kept - gpu.memory_allocated() >= 3 * 1024 * 256 * 4
    loss.backward()
    assert model[0].weight.grad is not None
    assert model[0].weight.grad.is_cuda


def test_a_model_goes_to_the_host_and_back(gpu: every_byte.VirtualGPU) -> None:
    model = nn.Linear(1000, 1000).cuda()
    held = gpu.memory_allocated()
    model.cpu()
    assert gpu.memory_allocated() == 0
    model.cuda()
    assert gpu.memory_allocated() == held


def test_an_optimizers_parameters_go_with_the_model(gpu: every_byte.VirtualGPU) -> None:
    model = nn.Linear(1024, 1024, bias=False).cuda()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(4, 1024, device="cuda")).sum().backward()
    optimizer.step()
    held, weight = gpu.memory_allocated(), model.weight
    model.cpu()
    assert model.weight is weight and weight.is_cpu and weight.grad.is_cpu
    assert gpu.memory_allocated() == held - 2 * 4 * 1024**2  # the states stay, as on CUDA
    model.cuda()
    assert model.weight is weight and weight.grad.is_cuda
    assert gpu.memory_allocated() == held


def test_data_is_set_from_the_host_and_back(gpu: every_byte.VirtualGPU) -> None:
    weight = nn.Parameter(torch.randn(512, 512))
    weight.data = weight.data.cuda()
    assert weight.is_cuda and weight.requires_grad and type(weight) is nn.Parameter
    assert gpu.memory_allocated() == 2**20
    weight.sum().backward()
    with pytest.raises(NotImplementedError, match=r"set \.grad to None"):
        weight.data = torch.randn(512, 512)
    weight.grad = None
    weight.data = torch.randn(512, 512)
    assert weight.is_cpu and gpu.memory_allocated() == 0


@pytest.mark.parametrize("on", ["cpu", "cuda"])
def test_data_parallel_with_its_one_card(gpu: every_byte.VirtualGPU, on: str) -> None:
    model = nn.DataParallel(nn.Linear(512, 512)).cuda()
    held = gpu.memory_allocated()
    x = torch.randn(64, 512, device=on, requires_grad=True)
    y = model(x)
    workspace = gpu.breakdown()["workspaces"]
    assert y.is_cuda and gpu.memory_allocated() == held + x.nbytes + y.nbytes + workspace
    y.sum().backward()
    assert x.grad is not None and x.grad.device.type == on


@pytest.mark.parametrize(
    "compute",
    [
        lambda card, host: card + host,
        lambda card, host: host * card,
        lambda card, host: torch.where(card > 0, card, host),
        lambda card, host: card @ host,
        lambda card, host: torch.einsum("ij,jk->ik", host, card),
        lambda card, host: torch.cat([card, host]),
        lambda card, host: nn.Linear(8, 8)(card),
    ],
)
def test_two_devices_are_refused_as_by_cuda(gpu: every_byte.VirtualGPU, compute: Any) -> None:
    card, host = torch.randn(8, 8, device="cuda"), torch.randn(8, 8)
    with pytest.raises(RuntimeError, match="on the same device, but found at least two devices"):
        compute(card, host)
    assert (card + torch.tensor(2.0)).is_cuda  # a scalar may come from the host
    card[host > 0] = 1
    card.copy_(host)


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_recurrent_weights_are_one_block(gpu: every_byte.VirtualGPU, name: str) -> None:
    with torch.device("cuda"):
        model = getattr(nn, name)(64, 128, num_layers=2, batch_first=True)
    assert gpu.memory_allocated() == -(-sum(p.nbytes for p in model.parameters()) // 512) * 512
    model(random(4, 16, 64))[0].sum().backward()


def test_a_report_looks_within_torch_func(gpu: every_byte.VirtualGPU) -> None:
    model, seen = nn.Linear(128, 1, bias=False).cuda(), []

    model.register_forward_pre_hook(lambda *_: seen.append(gpu.breakdown(model)["parameters"]))

    def loss(parameters: dict[str, torch.Tensor], x: torch.Tensor) -> Any:
        return torch.func.functional_call(model, parameters, (x,)).mean()

    torch.func.grad(loss)(dict(model.named_parameters()), torch.randn(4, 128, device="cuda"))
    assert seen == [512]


def test_a_triton_kernel_takes_no_memory(gpu: every_byte.VirtualGPU) -> None:
    triton = pytest.importorskip("triton")

    @triton.jit  # type: ignore[untyped-decorator]
    def doubled(x, y, z, n) -> None:  # type: ignore[no-untyped-def]
        pass

    x = torch.tensor([1, 2], device="cuda")
    y = torch.empty_like(x)
    held = gpu.memory_allocated()
    z = torch.ones((), device="cuda")
    held += 512
    doubled[(1,)](x, y, z, n=2)
    assert gpu.memory_allocated() == held and not gpu.memory.values.assumptions
    assert z.item() != z.item()  # NaN
    y.tolist()
    assert "a Triton kernel at test_cases.py" in str(list(gpu.memory.values.assumptions))


def test_streams_of_any_accelerator(gpu: every_byte.VirtualGPU) -> None:
    stream = torch.Stream(device="cuda")
    with stream:
        x = torch.zeros(2**20, device="cuda")
    event = stream.record_event(torch.Event("cuda"))
    event.synchronize()
    assert isinstance(torch.accelerator.current_stream(), torch.Stream)
    x.record_stream(torch.cuda.current_stream())
    assert any("record_stream" in estimate for estimate in gpu.estimates)
    del x
    assert gpu.memory_allocated() == 0


def test_accuracy_is_counted(gpu: every_byte.VirtualGPU) -> None:
    good = 0
    for _ in range(3):
        logits = torch.randn(8, 1000, device="cuda")
        labels = torch.randint(0, 10, (8,)).to("cuda")
        good += (logits.argmax(1) == labels).sum().item()
        if torch.isnan(logits).any():
            raise AssertionError
    assert 0 <= good <= 24
    assert len(gpu.memory.values.assumptions) >= 1


def test_accelerate_takes_the_card(gpu: every_byte.VirtualGPU) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(True)
    try:
        accelerator = accelerate.Accelerator(mixed_precision="no")
        assert accelerator.device.type == "cuda"
        model = nn.Linear(128, 128)
        optimizer = torch.optim.AdamW(model.parameters())
        model, optimizer = accelerator.prepare(model, optimizer)
        accelerator.backward(model(torch.randn(4, 128, device="cuda")).mean())
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        assert gpu.breakdown(model, optimizer.optimizer)["optimizer states"] == 2 * 4 * 129 * 128
    finally:
        accelerate.state.AcceleratorState._reset_state(True)


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(300, 300)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) * torch.ones(300, 300, device=x.device).triu()[0]


def test_an_exported_model_takes_what_the_model_takes() -> None:
    with every_byte.VirtualGPU("RTX 4090") as gpu:
        model, x = Masked().to(gpu.device), torch.zeros(2, 300, device=gpu.device)
        model(x)  # takes the workspace
        held = gpu.memory_allocated()
        exported = torch.export.export(model, (x,)).module()
        assert gpu.memory_allocated() == held
        gpu.reset_peak_memory_stats()
        model(x)
        expected = gpu.max_memory_allocated()
        gpu.reset_peak_memory_stats()
        exported(x)
        assert gpu.max_memory_allocated() == expected


def test_shapes_alone_take_no_memory(gpu: every_byte.VirtualGPU) -> None:
    with FakeTensorMode() as mode:
        x = torch.zeros(3, 9, device="cuda")
        fakes = [torch.zeros(99), nn.Linear(9, 9, device="cuda")(x)]
    x = torch.zeros(3, 9, device="cuda")
    fakes.append(mode.from_tensor(x) * 2)
    assert gpu.memory_allocated() == gpu.max_memory_allocated() == 512
    assert [fake.shape for fake in fakes] == [(99,), (3, 9), (3, 9)]


def test_make_fx_writes_down_the_programs_own_operations(gpu: every_byte.VirtualGPU) -> None:
    x = torch.zeros(3, 9, device="cuda")
    x.sin()
    graph = make_fx(lambda x: x.sin() + 1)(x).graph
    assert [node.name for node in graph.nodes] == ["x_1", "sin", "add", "output"]


def test_export_is_refused_in_one_line(gpu: every_byte.VirtualGPU) -> None:
    with pytest.raises(NotImplementedError, match=r"export it before \.cuda\(\)$"):
        torch.export.export(nn.Linear(9, 9).cuda(), (torch.zeros(3, 9, device="cuda"),))


@pytest.mark.parametrize("front", ["as_cuda", "VirtualGPU"])
@pytest.mark.parametrize(
    ("name", "make"),
    [
        (
            "torch.nested.nested_tensor",
            lambda d: torch.nested.nested_tensor([torch.zeros(3, device=d)]),
        ),
        ("torch.sparse_coo_tensor", lambda d: torch.sparse_coo_tensor([[0]], [1.0], device=d)),
        (
            "torch.quantize_per_tensor",
            lambda d: torch.quantize_per_tensor(torch.zeros(3, device=d), 1.0, 0, torch.qint8),
        ),
        (
            "torch.sparse_coo",
            lambda d: (
                nn.Embedding(9, 4, sparse=True, device=d)(torch.tensor([1], device=d))
                .sum()
                .backward()
            ),
        ),
        ("aten._to_sparse.default", lambda d: torch.zeros(3, device=d).to_sparse()),
        ("aten.to_mkldnn.default", lambda d: torch.zeros(3, device=d).to_mkldnn()),
    ],
)
def test_what_is_not_replayed_is_refused_by_name_in_one_line(
    front: str, name: str, make: Callable[[Any], Any]
) -> None:
    with every_byte.as_cuda("T4") if front == "as_cuda" else every_byte.VirtualGPU("T4") as gpu:
        with pytest.raises(NotImplementedError, match=f"^[^\n]*{name}[^\n]*$"):
            make(gpu.device)


def test_what_a_compiler_makes_memory_for_is_refused_by_name(gpu: every_byte.VirtualGPU) -> None:
    with pytest.raises(NotImplementedError, match=r"^flex_attention is not replayed: .*plain op"):
        flex_attention(*torch.zeros(3, 1, 2, 128, 64, device="cuda").unbind())


def test_a_transformer_in_inference_says_that_it_takes_no_fast_path(
    gpu: every_byte.VirtualGPU,
) -> None:
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).cuda()
    x, mask = random(2, 8, 64), torch.zeros(2, 8, dtype=torch.bool, device="cuda")
    model(x, src_key_padding_mask=mask)
    assert not gpu.estimates
    with torch.no_grad():
        assert model.eval()(x, src_key_padding_mask=mask).shape == x.shape
    assert "without PyTorch's fast path" in gpu.estimates[0]


def test_whisper_goes_on_behind_a_segment_of_assumed_tokens(gpu: every_byte.VirtualGPU) -> None:
    """What a library's `_retrieve_segment` finds: else it would begin again for ever."""
    tokens = torch.randn(1, 20, 500, device="cuda").argmax(-1)[0]
    text = "def _retrieve_segment(tokens): return torch.where(tokens >= 40)[0]"
    scope: dict[str, Any] = {"torch": torch}
    exec(compile(text, torch.__file__, "exec"), scope)
    assert scope["_retrieve_segment"](tokens).shape == (0,)
    assert torch.where(tokens >= 40)[0].shape == (20,)  # a program's own: the largest
    said = [str(one) for one in gpu.memory.values.assumptions]
    assert "nonzero() answered what it is of the tokens that were assumed" in said[0]


def test_a_whole_number_of_an_unknown_one_is_refused_in_one_line() -> None:
    with (
        pytest.raises(every_byte.virtual.values.UnknownValueError, match=r"^int\(\) of a number"),
        every_byte.as_cuda("RTX 4090"),
    ):
        int(torch.randn(10_000, device="cuda").sum().item())
    with pytest.raises(ValueError, match=r"^invalid literal"), every_byte.as_cuda("RTX 4090"):
        int("a")


@pytest.mark.parametrize("name", ["MultiMarginLoss", "MultiLabelMarginLoss"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_losses_with_margins_of_classes_have_gradients(
    gpu: every_byte.VirtualGPU, name: str, reduction: str
) -> None:
    x = random(256, 1000)
    y = torch.zeros(256, 1000, dtype=torch.long, device="cuda")
    loss = getattr(nn, name)(reduction=reduction)
    loss(x, y if name == "MultiLabelMarginLoss" else y[:, 0]).sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape
    before = gpu.memory_allocated()
    x.grad = None
    assert before - gpu.memory_allocated() == x.nbytes


@pytest.mark.parametrize("name", ["roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool"])
def test_torchvisions_operators_cast_under_autocast(gpu: every_byte.VirtualGPU, name: str) -> None:
    """As ``torchvision/csrc/ops/autocast/`` has it: to FP32, and their results back."""
    ops = pytest.importorskip("torchvision.ops")
    features = torch.randn(1, 49, 32, 32, device="cuda", dtype=torch.float16, requires_grad=True)
    boxes = [torch.rand(64, 4, device="cuda")]
    with pytest.raises(RuntimeError, match="same type"):
        getattr(ops, name)(features, boxes, 7)
    with torch.autocast("cuda", torch.float16):
        made = getattr(ops, name)(features, boxes, 7)
        kept = ops.nms(boxes[0], torch.rand(64, device="cuda").half(), 0.5)
    assert made.dtype is torch.float16 and made.size(0) == 64 and kept.dtype is torch.int64
    made.sum().backward()
    assert features.grad is not None and features.grad.dtype is torch.float16


def test_jacobian_vector_products_and_hessians(gpu: every_byte.VirtualGPU) -> None:
    """Whose decompositions PyTorch compiles, when it is first asked for one."""
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 1)).cuda()
    x = torch.randn(8, 16, device="cuda")
    value, tangent = torch.func.jvp(model, (x,), (torch.ones_like(x),))
    assert value.shape == tangent.shape == (8, 1) and tangent.is_cuda
    assert torch.func.hessian(lambda x: model(x).sum())(x[0]).shape == (16, 16)
