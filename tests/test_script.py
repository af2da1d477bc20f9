"""An unchanged CUDA script on a virtual card, with what libraries ask of ``torch.cuda``."""

import gc
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import every_byte

ARTICLE = """
import torch
from torch import nn, optim
device = "cuda" if torch.cuda.is_available() else "cpu"
widths = (784, 8192, 4096, 2048, 1024, 512, 10)
layers = [l for a, b in zip(widths, widths[1:]) for l in (nn.Linear(a, b), nn.ReLU())]
model = nn.Sequential(nn.Flatten(), *layers[:-1]).to(device)
opt = optim.Adam(model.parameters(), lr=1e-3)
x = torch.randn(128, 1, 28, 28).to(device)
y = torch.randint(0, 10, (128,)).cuda()
opt.zero_grad()
out = model(x)
loss = nn.CrossEntropyLoss()(out, y)
loss.backward()
opt.step()
seen = loss.item(), torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
"""


@pytest.fixture(name="gpu")
def one_card() -> Any:
    with every_byte.as_cuda("RTX 4090") as gpu:
        yield gpu


def test_the_articles_script_runs_unchanged() -> None:
    scope: dict[str, Any] = {}
    with every_byte.as_cuda("RTX 4090") as gpu:
        exec(ARTICLE, scope)
    loss, *figures = scope["seen"]
    assert loss != loss  # NaN: nobody knows it
    assert figures == [833_577_472, 1_037_609_984]
    assert [a.operation for a in gpu.memory.values.assumptions] == ["item()"]


def test_all_is_as_before_at_the_end() -> None:
    def look() -> list[object]:
        names = [getattr(torch.cuda, name) for name in dir(torch.cuda)]
        names += [getattr(torch.accelerator, name) for name in dir(torch.accelerator)]
        return [*names, torch.Generator, torch.load, torch.tensor, torch.Tensor.pin_memory]

    before = look()
    with every_byte.as_cuda("RTX 4090"):
        assert torch.cuda.is_available()
    after = look()
    assert all(a is b or a == b for a, b in zip(before, after, strict=True))
    assert torch.zeros(1, device="meta").is_meta


def test_one_card_at_a_time(gpu: every_byte.VirtualGPU) -> None:
    with pytest.raises(RuntimeError, match="in use already"), every_byte.as_cuda("T4"):
        pass


def test_tensors_answer_as_cudas_do(gpu: every_byte.VirtualGPU) -> None:
    x = torch.tensor([1, 2], device="cuda")
    assert (x.device, x.is_cuda, x.is_meta, x.is_cpu) == (
        torch.device("cuda", 0),
        True,
        False,
        False,
    )
    assert repr(x) == "tensor([1, 2], device='cuda:0')"
    assert x.tolist() == x.cpu().numpy().tolist() == [1, 2]
    loss = torch.randn(100, 100, device="cuda", requires_grad=True).mean()
    assert repr(loss) == "tensor(nan, device='cuda:0', grad_fn=<MeanBackward0>)"
    assert f"{loss:.3f}" == "nan"
    assert x.cuda() is x
    assert x.to("cuda:0") is x
    assert x.data_ptr() != x.clone().data_ptr()
    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        torch.zeros(1, device="cuda:1")


@pytest.mark.parametrize(
    "place",
    [
        *([True, False, True], [0, 2], [], [False, False, False]),
        *(
            ([True, False, True], [1]),
            (slice(None), [0, -1]),
            (Ellipsis, [True, False, True, True]),
        ),
        *(([[0, 1], [1, 0]],), ([True, False, False], 1)),
    ],
    ids=str,
)
def test_the_numbers_of_an_index_are_known(gpu: every_byte.VirtualGPU, place: Any) -> None:
    host = torch.arange(12).view(3, 4)
    x = host.cuda()
    assert torch.equal(x[place].cpu(), host[place])
    x[place] = 0
    host[place] = 0
    assert torch.equal(x.cpu(), host)
    assert not gpu.memory.values.assumptions


def test_a_device_context_and_what_the_script_puts_on_meta(gpu: every_byte.VirtualGPU) -> None:
    with torch.device("cuda"):
        model = nn.Linear(100, 100, bias=False)
    assert (model.weight.device.type, gpu.memory_allocated()) == ("cuda", 40_448)
    with torch.device("meta"):
        other = nn.Linear(100, 100)
    assert other.weight.is_meta
    assert torch.zeros(9, device="meta").device.type == "meta"
    other.state_dict()
    assert gpu.memory_allocated() == 40_448
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        other.weight.to("cuda")
    assert other.to_empty(device="cuda").weight.is_cuda
    assert gpu.memory_allocated() == 2 * 40_448 + 512


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint_and_functions_in_backward(gpu: every_byte.VirtualGPU, reentrant: bool) -> None:
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Any) -> Any:
            return x * 2

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            assert grads[0].is_cuda
            return grads[0] * torch.full((1,), 2.0, device="cuda")

    x = torch.randn(64, 512, device="cuda", requires_grad=True)
    layer = nn.Sequential(nn.Linear(512, 512), nn.Dropout(0.1)).cuda()
    seen = []
    x.register_hook(lambda grad: seen.append(grad.device.type))
    checkpoint(lambda y: layer(Doubled.apply(y)), x, use_reentrant=reentrant).sum().backward()
    assert seen == ["cuda"]
    assert x.grad is not None
    assert x.grad.is_cuda


def test_autocast_and_gradient_scaling(gpu: every_byte.VirtualGPU) -> None:
    model = nn.Linear(64, 64).cuda()
    optimizer = torch.optim.AdamW(model.parameters())
    scaler = torch.amp.GradScaler("cuda")
    assert scaler.is_enabled()
    for _ in range(2):
        with torch.autocast("cuda", dtype=torch.float16):
            y = model(torch.randn(8, 64, device="cuda"))
        assert y.dtype is torch.float16
        scaler.scale(y.float().mean()).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert scaler.get_scale() == 65536
    assert len(optimizer.state) == 2


def test_data_from_workers_and_pinned(gpu: every_byte.VirtualGPU) -> None:
    data = TensorDataset(torch.randn(8, 4), torch.arange(8))
    for x, y in DataLoader(data, batch_size=4, num_workers=1, pin_memory=True):
        assert y.to("cuda", non_blocking=True).sum().item() in (6, 22)
        assert x.cuda(non_blocking=True).is_cuda


def test_what_is_saved_comes_back(gpu: every_byte.VirtualGPU, tmp_path: Path) -> None:
    model = nn.Linear(10, 10).cuda()
    torch.save({"model": model.state_dict(), "step": torch.tensor(3).cuda()}, tmp_path / "a.pt")
    for where in ("cuda", torch.device("cuda:0")):
        gc.collect()  # torch.save of 2.8 leaves what it wrote in a cycle
        before = gpu.memory_allocated()
        loaded = torch.load(tmp_path / "a.pt", map_location=where)
        assert gpu.memory_allocated() - before == 3 * 512
        assert loaded["model"]["weight"].is_cuda
        assert loaded["step"].item() == 3
        model.load_state_dict(loaded["model"])
        del loaded
    assert torch.load(io.BytesIO((tmp_path / "a.pt").read_bytes()), map_location="cpu")


def test_a_whole_model_comes_back_where_it_was(gpu: every_byte.VirtualGPU, tmp_path: Path) -> None:
    path, host, before = tmp_path / "a.pt", nn.Linear(10, 10), gpu.memory_allocated()
    torch.save(host, path)
    loaded = torch.load(path, weights_only=False)
    assert not loaded.weight.is_cuda and gpu.memory_allocated() == before
    torch.save(host.cuda(), path)
    before = gpu.memory_allocated()
    loaded = torch.load(path, weights_only=False)
    assert loaded.weight.is_cuda and gpu.memory_allocated() - before == 2 * 512


def test_what_is_asked_of_torch_cuda(gpu: every_byte.VirtualGPU) -> None:
    cuda = torch.cuda
    x = torch.zeros(1000, device="cuda")
    assert (cuda.device_count(), cuda.current_device()) == (1, 0)
    assert cuda.get_device_name(0) == "RTX 4090"
    assert cuda.get_device_properties("cuda").total_memory == cuda.mem_get_info()[1]
    assert cuda.mem_get_info()[1] == every_byte.data.cards()["RTX 4090"].usable
    assert cuda.memory_allocated(0) == cuda.memory_stats()["allocated_bytes.all.current"] == 4096
    assert "4096 B" in cuda.memory_summary(abbreviated=True)
    assert torch.accelerator.current_accelerator() == torch.device("cuda")
    assert torch.accelerator.memory_allocated() == 4096
    start, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
    start.record()
    stream = cuda.Stream()
    with cuda.stream(stream):
        assert cuda.current_stream() == stream
        y = torch.zeros(10, device="cuda")
    y.record_stream(cuda.current_stream())
    cuda.synchronize()
    assert start.elapsed_time(end) == 0
    cuda.manual_seed_all(3)
    cuda.set_device("cuda:0")
    generator = torch.Generator(device="cuda").manual_seed(3)
    assert torch.randn(3, device="cuda", generator=generator).is_cuda
    assert generator.device.type == "cuda"
    with cuda.device(0):
        cuda.empty_cache()
    cuda.reset_peak_memory_stats()
    assert cuda.device_memory_used() >= cuda.memory_reserved()
    cuda.set_per_process_memory_fraction(0.5)
    assert cuda.get_per_process_memory_fraction() == 0.5
    total, here = (
        cuda.mem_get_info()[1],
        r"Tried to allocate 11\.69 GiB\. GPU 0 has .*11\.62 GiB allowed",
    )
    with pytest.raises(cuda.OutOfMemoryError, match=here):
        torch.empty(total // 2 + 2**26, dtype=torch.uint8, device="cuda")
    del x
    cuda.empty_cache()
    half = total // 2 - 2**23  # what is reserved already counts
    torch.empty(half, dtype=torch.uint8, device="cuda")  # a context is not counted there
    cuda.set_per_process_memory_fraction(1.0)
    x = torch.empty(total // 2 + 2**26, dtype=torch.uint8, device="cuda")
    assert x.is_cuda


def test_a_paged_optimizer_keeps_its_states_beside_the_allocator() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    from bitsandbytes.optim import AdamW8bit, PagedAdamW8bit

    taken, plain = {}, functional.get_paged
    for kind in (AdamW8bit, PagedAdamW8bit):
        with every_byte.as_cuda("RTX 4090") as gpu:
            model = nn.Linear(512, 512, bias=False, device="cuda")
            optimizer = kind(model.parameters())
            for _ in range(2):
                model(torch.ones(2, 512, device="cuda")).sum().backward()
                optimizer.step()
            taken[kind], told = gpu.memory_allocated(), " ".join(gpu.estimates)
    assert taken[AdamW8bit] - taken[PagedAdamW8bit] == 2 * 512 * 512
    assert "counted as on the host" in told
    assert functional.get_paged is plain


def test_old_kinds_of_tensors(gpu: every_byte.VirtualGPU) -> None:
    kind: Any = torch.cuda.FloatTensor
    x, y = kind(3, 4).fill_(1.0), kind([1.0, 2.0])
    z = torch.ones(300).type("torch.cuda.LongTensor")
    assert x.is_cuda and (x.shape, y.tolist()) == ((3, 4), [1.0, 2.0])
    assert z.is_cuda and z.dtype is torch.int64 and z.type() == "torch.cuda.LongTensor"
    assert isinstance(x, kind) and not isinstance(z, kind)
    assert torch.ones(3).type() == "torch.FloatTensor"
    assert gpu.memory_allocated() == 512 + 512 + 2560
    torch.set_default_tensor_type("torch.cuda.HalfTensor")
    try:
        assert torch.ones(3).is_cuda and torch.ones(3).dtype is torch.float16
    finally:
        torch.set_default_device(None)
        torch.set_default_tensor_type("torch.FloatTensor")
    assert torch.ones(3).is_cpu and torch.ones(3).dtype is torch.float32


@pytest.mark.parametrize(
    "name",
    ["CUDAGraph", "MemPool", "caching_allocator_alloc", "make_graphed_callables"],
)
def test_memory_that_is_not_pytorchs_own_is_refused(gpu: every_byte.VirtualGPU, name: str) -> None:
    with pytest.raises(
        NotImplementedError, match=rf"^torch\.cuda\.{name} is not replayed .*here|of"
    ):
        getattr(torch.cuda, name)(100)
    assert isinstance(getattr(torch.cuda, name), type) is name[0].isupper()


def test_what_inference_mode_made_is_read_outside_of_it(gpu: every_byte.VirtualGPU) -> None:
    """Its tensors pass autograd by, so composite operations such as .cpu() arrive whole."""
    layer = nn.Linear(4, 3).cuda()
    with torch.inference_mode():
        known = torch.arange(5, device="cuda")
        result = layer(torch.zeros(2, 4, device="cuda"))
        assumed = result.argmax(-1)
    assert known.cpu().tolist() == known.to("cpu").tolist() == known.tolist() == [0, 1, 2, 3, 4]
    assert known.float().cpu().sum().item() == 10
    assert result.cpu().shape == (2, 3)
    assert assumed.cpu().numpy().tolist() == result.cpu().argmax(-1).tolist()
    before = gpu.memory_allocated()
    kept = result.to(torch.float64)
    assert gpu.memory_allocated() - before == 512 and kept.is_cuda


def test_memory_stats_count_segments_retries_and_failures() -> None:
    """DeviceStats in c10/core/CachingDeviceAllocator.h; CUDACachingAllocator.cpp counts."""
    with every_byte.as_cuda("T4", 100 * 2**20, context=0, torch_version="2.14"):
        stats = torch.cuda.memory_stats
        kept = torch.empty(3 * 2**20, dtype=torch.uint8, device="cuda")  # in a segment of 20 MiB
        small = torch.empty(1000, dtype=torch.uint8, device="cuda")  # in one of 2 MiB
        told = stats()
        assert (told["num_device_alloc"], told["num_device_free"]) == (2, 0)
        assert (told["num_alloc_retries"], told["num_ooms"], told["max_split_size"]) == (0, 0, -1)
        assert told["requested_bytes.all.peak"] == 3 * 2**20 + 1000
        assert told["requested_bytes.small_pool.current"] == 1000
        assert told["inactive_split_bytes.large_pool.current"] == 17 * 2**20
        assert told["inactive_split_bytes.small_pool.current"] == 2 * 2**20 - 1024
        assert told["inactive_split.all.current"] == told["active.all.current"] == 2
        torch.empty(60 * 2**20, dtype=torch.uint8, device="cuda")  # freed at once, kept in reserve
        assert stats()["inactive_split_bytes.large_pool.current"] == 17 * 2**20  # it is whole
        other = torch.empty(70 * 2**20, dtype=torch.uint8, device="cuda")  # needs its place
        told = stats()
        assert (told["num_alloc_retries"], told["num_sync_all_streams"]) == (1, 1)
        assert (told["num_device_alloc"], told["num_device_free"]) == (4, 1)
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(70 * 2**20, dtype=torch.uint8, device="cuda")
        assert (stats()["num_alloc_retries"], stats()["num_ooms"]) == (2, 1)
        torch.cuda.reset_accumulated_memory_stats()
        assert (stats()["num_alloc_retries"], stats()["num_device_alloc"]) == (0, 0)
        del kept, small, other


@pytest.mark.parametrize(
    ("card", "context"),
    [("H200", 726_466_560), ("H100 80GB HBM3", 736_952_320), ("RTX 5090", 935_600_873), (None, 0)],
)
def test_a_cards_context_is_its_own(card: str | None, context: int) -> None:
    with every_byte.as_cuda(card) as gpu:
        assert gpu.memory.context == context
        if card is not None:
            free, total = torch.cuda.mem_get_info()
            assert total - free == context


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize(
    ("make", "nbytes"),
    [
        (lambda: torch.UntypedStorage(1000, device="cuda"), 1024),
        (lambda: torch.UntypedStorage(1000, device=torch.device("cuda", 0)), 1024),
        (lambda: torch.cuda.FloatStorage(1000), 4096),
        (lambda: torch.TypedStorage(1000, dtype=torch.float32, device="cuda"), 4096),
        (lambda: torch.ones(1000).untyped_storage().cuda(), 4096),
        (lambda: torch.UntypedStorage(1000), 0),
    ],
)
def test_storages_without_a_tensor_take_their_bytes(
    make: Any, nbytes: int, gpu: every_byte.VirtualGPU
) -> None:
    storage = make()
    assert torch.cuda.memory_allocated() == nbytes
    del storage
    assert torch.cuda.memory_allocated() == 0


def test_scripted_functions_run_eagerly_and_say_so_once(gpu: every_byte.VirtualGPU) -> None:
    """TorchScript would compile our own torch.tensor, which takes keyword arguments."""
    with pytest.warns(UserWarning, match="torch.jit.script: the virtual card runs it eagerly") as w:

        @torch.jit.script
        def scale(x: torch.Tensor) -> torch.Tensor:
            return x * torch.tensor(2.0, device=x.device)

        @torch.jit.script
        def twice(x: torch.Tensor) -> torch.Tensor:
            return scale(scale(x))

    assert len(w) == 1
    assert twice(torch.empty(4, device="cuda")).device.type == "cuda"


def test_compiled_models_run_eagerly_and_say_so(gpu: every_byte.VirtualGPU) -> None:
    with pytest.warns(UserWarning, match="runs it eagerly"):
        model = torch.compile(nn.Linear(3, 3).cuda())
    assert model(torch.zeros(1, 3, device="cuda")).is_cuda


# Libraries


@pytest.fixture(name="llama")
def a_small_llama() -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=1000,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=128,
        )
    )


def test_a_padding_mask_is_known(gpu: every_byte.VirtualGPU, llama: Any) -> None:
    llama.cuda()
    ids = torch.randint(0, 1000, (2, 32)).cuda()
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    llama(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
    assert not gpu.memory.values.assumptions


@pytest.mark.parametrize(
    "options", [{"do_sample": False}, {"do_sample": True}, {"cache_implementation": "static"}]
)
def test_generation_ends_by_its_length(
    gpu: every_byte.VirtualGPU, llama: Any, options: dict[str, Any]
) -> None:
    llama.cuda().eval()
    ids = torch.randint(3, 1000, (1, 16), device="cuda")
    assert llama.generate(ids, max_new_tokens=4, **options).shape == (1, 20)


@pytest.mark.parametrize("options", [{}, {"do_sample": True}, {"early_stopping": True}])
def test_beam_search_goes_on_to_its_length_and_says_so(
    gpu: every_byte.VirtualGPU, llama: Any, options: dict[str, Any]
) -> None:
    llama.cuda().eval()
    ids = torch.randint(3, 1000, (2, 16), device="cuda")
    found = llama.generate(
        ids,
        max_new_tokens=5,
        num_beams=3,
        num_return_sequences=2,
        output_scores=True,
        return_dict_in_generate=True,
        **options,
    )
    assert found.sequences.shape == (4, 21) and len(found.scores) == 5
    assert llama.generate(ids[:1], max_new_tokens=5, num_beams=3, **options).shape == (1, 21)
    assert all(score.shape == (6, 1000) for score in found.scores)
    assert any("answered True" in str(a) for a in gpu.memory.values.assumptions)


def test_a_trainer_takes_the_card_by_itself(
    gpu: every_byte.VirtualGPU, llama: Any, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    ids = torch.randint(0, 1000, (8, 32))
    trainer = transformers.Trainer(
        llama,
        transformers.TrainingArguments(
            str(tmp_path),
            per_device_train_batch_size=2,
            max_steps=3,
            report_to=[],
            logging_steps=1,
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=[{"input_ids": i, "labels": i} for i in ids],
    )
    trainer.train()
    assert trainer.state.global_step == 3
    held = gpu.breakdown(llama, trainer.optimizer)
    size = sum(p.nbytes for p in llama.parameters())
    assert held["parameters"] == size
    assert held["optimizer states"] >= 2 * size


@pytest.mark.parametrize("device_map", ["cuda", {"": 0}, "auto"])
def test_a_model_is_loaded_to_the_card(
    gpu: every_byte.VirtualGPU, llama: Any, device_map: Any, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    llama.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, device_map=device_map)
    assert loaded.device == torch.device("cuda", 0)
    size = sum(p.nbytes for p in loaded.parameters())
    assert size <= gpu.memory_allocated() <= size + 4096


def test_a_library_clears_cublas_workspaces_as_on_cuda() -> None:
    """Lightning does, at the end of a training."""
    before = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)
    with every_byte.as_cuda("H100", context=0) as gpu:
        torch.ones(4, 4, device="cuda") @ torch.ones(4, 4, device="cuda")
        assert gpu.memory_allocated() == 32 * 2**20
        torch._C._cuda_clearCublasWorkspaces()
        assert gpu.memory_allocated() == 0
    assert getattr(torch._C, "_cuda_clearCublasWorkspaces", None) is before
