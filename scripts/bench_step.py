"""Step time of this trainer beside TRL's GRPOTrainer, and the time from the command to the first finished step.

    python scripts/bench_step.py                       the embedded agent, 8 prompts x 8 samples a step, one thread
    python scripts/bench_step.py --model-shape 24m     a random Qwen3 of 24 M parameters (0.6b: for a GPU)
    python scripts/bench_step.py --startup             from the command to the first line of metrics.jsonl

Both trainers do the same work in one process, in turns (ours, TRL, ours, TRL, ...), so that a busy machine slows both alike:
the same base, prompts, samples, length limits, LoRA, learning rate, temperature, threads, one optimizer step on all samples.
Ours is the worker group of `trainer.backend=inprocess` driven as `verl/trainer.py` does. TRL is set up as well as we know:
no gradient checkpointing, no reference model, no logging, the fastest micro-batch, its own tool loop with a parser for our
`<calc>` calls. `gen_tokens` are those the policy chose, `update_tokens` all of prompts and responses, counted alike. `cpu_s`
is the process's CPU time: on a machine that others use too, its ratio is the one to look at.

Where the two differ, it is in what they do with the same work: on the embedded agent ours leaves samples without advantage
out of the update, which is exact; TRL computes them. In the random models no tool is called (a random model cannot), the
reward is a coin thrown by hashing the answer, so that nearly every group has advantages, and the end-of-turn token is made
likely enough that lengths vary. A TRL turn that is cut short inside a call still runs the tool, ours ends the sample.

Left out: validation, checkpoints, tracking, vLLM, several workers. TRL's tool loop needs transformers 5.13 or later.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trl import GRPOTrainer  # pyright: ignore[reportPrivateImportUsage]

TINY_BASE = Path(__file__).resolve().parents[1] / "agentlightning" / "calculator" / "base"


@dataclass(frozen=True, slots=True)
class Qwen3Sizes:
    """Of a random model with the embedded tokenizer, in the words of its config.json."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int


@dataclass(frozen=True, slots=True)
class Shape:
    """What to bench: the embedded agent, or a random model."""

    trl_micro_batch: int  # samples a forward pass in TRL; on CPU the fastest of 8, 16 and 64
    overrides: tuple[str, ...] = ()
    random: Qwen3Sizes | None = None
    mean_response: int = 0  # tokens that an answer of the random model would have if no limit cut it short


SECONDS = ("step_s", "cpu_s", "gen_s", "update_s")
ONE_TURN = "actor_rollout_ref.rollout.multi_turn.enable=false"
SHAPES = {
    "tiny": Shape(64),
    "24m": Shape(16, (ONE_TURN, "actor_rollout_ref.actor.optim.lr=1e-5"), Qwen3Sizes(512, 8, 8, 4, 64, 1408, 264), 48),
    "0.6b": Shape(
        16,
        (ONE_TURN, "model=qwen3_0_6b", "data.max_prompt_length=128", "data.max_response_length=512"),
        Qwen3Sizes(1024, 28, 16, 8, 128, 3072, 151936),
        256,
    ),
}


@dataclass(frozen=True, slots=True)
class StepTime:
    """One step: seconds of it and of its phases, and the tokens they handled."""

    seconds: float
    cpu_seconds: float  # of all threads of this process
    gen_seconds: float
    update_seconds: float
    gen_tokens: int
    update_tokens: int
    score: float


def hash_score(data_source: str, solution_str: str, ground_truth: str, extra_info: Mapping[str, Any] | None = None) -> float:
    """A reward for a model that cannot earn one: a coin thrown by the answer's text."""
    return float(zlib.crc32(solution_str.encode()) % 2)


def save_random_base(sizes: Qwen3Sizes, mean_response: int, path: Path) -> None:
    """A random Qwen3 whose answers end after `mean_response` tokens on average."""
    import torch
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(TINY_BASE)
    torch.manual_seed(0)
    config = Qwen3Config(
        **asdict(sizes), tie_word_embeddings=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        # All hidden states get a common part, and the end-of-turn token's row of the output head looks at it alone.
        model.model.embed_tokens.weight[:, 0] += 1.0
        state_H = model.model(torch.randint(0, 256, (8, 64))).last_hidden_state.mean((0, 1))
        logit = math.log(sizes.vocab_size / mean_response)
        model.lm_head.weight[tokenizer.eos_token_id] = logit * state_H / state_H.dot(state_H)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


class Ours:
    """This trainer's objects, one worker in this process."""

    def __init__(self, overrides: Sequence[str], reward: Callable[..., float] | None) -> None:
        import torch

        from agentlightning.algorithms.kl import FixedKLController
        from agentlightning.models.chat import load_tokenizer
        from agentlightning.verl.assembly import choose_placement, worker_settings
        from agentlightning.verl.batching import MiniBatchPlan
        from agentlightning.verl.config import load_config
        from agentlightning.verl.data import PromptDataset
        from agentlightning.verl.rewards import load_reward
        from agentlightning.workers.group import InProcess, WorkerGroup

        self.config = load_config(["trainer.backend=inprocess", *overrides])
        self.reward = reward or load_reward(self.config.custom_reward_function)
        tokenizer = load_tokenizer(self.config.actor_rollout_ref.model.path)
        self.data = PromptDataset.from_config(self.config.data, tokenizer)
        self.placement = choose_placement(self.config, torch.cuda.device_count(), os.cpu_count() or 1)
        self.group = WorkerGroup(InProcess(worker_settings(self.config, self.placement, total_steps=1), lambda: None))
        actor, rollout = self.config.actor_rollout_ref.actor, self.config.actor_rollout_ref.rollout
        self.plan = MiniBatchPlan(
            actor.ppo_mini_batch_size, rollout.n, actor.ppo_epochs, actor.shuffle, float(self.config.data.max_response_length)
        )
        self.kl_controller = FixedKLController(0.0)  # there is no KL in the reward

    def step(self, step: int) -> StepTime:
        """The default step of `AgentLightningTrainer._step`: GRPO, one update."""
        from agentlightning.verl.batching import make_batch, rollout_probs_diff, with_advantages
        from agentlightning.verl.rewards import score

        prompts = self.data.step_prompts(step)
        seed = self.config.trainer.seed
        cpu_start, start = time.process_time(), now()
        completions = self.group.generate(prompts, self.config.train_sampling(), seed=seed, step=step, version=step - 1)
        generated = now()
        scores_B = score(self.reward, prompts, completions).score_B
        batch, _ = with_advantages(make_batch(prompts, completions, scores_B), self.config.algorithm, self.kl_controller)
        updating = now()
        _, log_probs_BT = self.group.update_actor(batch, self.plan.mini_batches(batch, seed, step), step)
        updated = now()
        rollout_probs_diff(batch, log_probs_BT)
        self.group.update_weights(step)
        return StepTime(
            seconds=now() - start,
            cpu_seconds=time.process_time() - cpu_start,
            gen_seconds=generated - start,
            update_seconds=updated - updating,
            gen_tokens=int(batch.mask_BT.sum()),
            update_tokens=int(batch.total_len_B.sum()),
            score=float(scores_B.mean()),
        )


# The embedded template, and tool calls as TRL hands them over. TRL wants to see that any tool can be rendered.
TRL_CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|' ~ message['role'] ~ '|>' ~ message['content'] -}}
{%- for call in message['tool_calls'] or [] -%}
{%- set function = call['function'] -%}
{{- '<calc>' ~ function['arguments']['expression'] ~ '</calc>' if function['name'] == 'calculate' else function | tojson -}}
{%- endfor -%}
{{- '<|end|>' -}}
{%- endfor -%}
{{- '<|assistant|>' if add_generation_prompt -}}
"""
TRL_CALL = {"type": "function", "function": {"name": "calculate", "arguments": {"expression": "{content}"}}}
TRL_RESPONSE_TEMPLATE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|assistant|>",
    "fields": {
        "tool_calls": {"open": "<calc>", "close": "</calc>", "repeats": True, "content": "text", "transform": TRL_CALL},
        "content": {"close": "<|end|>", "content": "text"},
    },
}


def calculate(expression: str) -> str:
    """The calculator as TRL calls tools.

    Args:
        expression: one operator between two integers.

    Returns:
        The result, or "error".
    """
    from agentlightning.calculator import task

    return task.calculate(f"{task.OPEN_TAG}{expression}{task.CLOSE_TAG}") or "error"


def trl_reward(reward: Callable[..., float]) -> Callable[..., list[float | None]]:
    """A reward with verl's signature as TRL calls rewards."""

    def compute_score(completions: Any, ground_truth: list[str], data_source: list[str], **_: object) -> list[float | None]:
        last_turns = [turns[-1] for turns in completions]
        answers = [turn["content"] if turn["role"] == "assistant" else "" for turn in last_turns]
        return [float(reward(*row)) for row in zip(data_source, answers, ground_truth, strict=True)]

    return compute_score


def make_trl_trainer(ours: Ours, shape: Shape, steps: int, work_dir: Path) -> GRPOTrainer:
    """GRPOTrainer for the same work: the prompts of `steps` steps of ours, in their order."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer  # pyright: ignore[reportPrivateImportUsage]

    config, cuda = ours.config, ours.placement.device == "cuda"
    model, actor, rollout = config.actor_rollout_ref.model, config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    sampling, samples = config.train_sampling(), config.data.train_batch_size * rollout.n
    micro_batch = min(shape.trl_micro_batch, samples)
    tokenizer = AutoTokenizer.from_pretrained(model.path)
    tokenizer.chat_template = TRL_CHAT_TEMPLATE
    if rollout.multi_turn.enable:
        tokenizer.response_template = TRL_RESPONSE_TEMPLATE
    prompts = [prompt for step in range(1, steps + 1) for prompt in ours.data.step_prompts(step)]
    return GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model.path, dtype=torch.bfloat16 if cuda else torch.float32),
        reward_funcs=trl_reward(ours.reward),
        args=GRPOConfig(
            output_dir=str(work_dir),
            max_steps=steps,
            per_device_train_batch_size=micro_batch,
            gradient_accumulation_steps=samples // micro_batch,
            num_generations=rollout.n,
            max_completion_length=sampling.max_tokens,
            generation_kwargs={"max_new_tokens": sampling.max_tokens_per_turn or sampling.max_tokens},
            max_tool_calling_iterations=sampling.max_assistant_turns - 1,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=0,
            learning_rate=actor.optim.lr,
            lr_scheduler_type="constant",
            max_grad_norm=actor.grad_clip,
            epsilon=actor.clip_ratio,
            beta=0.0,
            loss_type="dapo",  # the mean over all tokens, as token-mean
            gradient_checkpointing=model.enable_gradient_checkpointing,
            shuffle_dataset=False,
            use_cpu=not cuda,
            bf16=cuda,
            report_to="none",
            logging_strategy="no",
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(
            [{"prompt": list(p.messages), "ground_truth": p.ground_truth, "data_source": p.data_source} for p in prompts]
        ),
        processing_class=tokenizer,
        tools=[calculate] if rollout.multi_turn.enable else None,
        peft_config=LoraConfig(
            r=model.lora_rank,
            lora_alpha=model.lora_alpha,  # pyright: ignore[reportArgumentType]
            target_modules=model.target_modules,  # pyright: ignore[reportArgumentType]
            task_type="CAUSAL_LM",  # pyright: ignore[reportArgumentType]
        ),
    )


class TrlClock:
    """Times the phases of a GRPOTrainer's steps: its methods for generation, inputs (generation to advantages) and rewards."""

    def __init__(self, trainer: GRPOTrainer) -> None:
        self._generate, self._prepare_inputs = trainer._generate, trainer._prepare_inputs
        self._calculate_rewards = trainer._calculate_rewards
        trainer._generate, trainer._prepare_inputs = self.generate, self.prepare_inputs
        trainer._calculate_rewards = self.calculate_rewards
        self.begin()

    def begin(self) -> None:
        """Before a step."""
        self.gen_seconds = self.inputs_seconds = self.score = 0.0
        self.gen_tokens = self.update_tokens = 0
        self.cpu_start, self.start = time.process_time(), now()

    def end(self) -> StepTime:
        """The step has ended."""
        seconds = now() - self.start
        return StepTime(
            seconds=seconds,
            cpu_seconds=time.process_time() - self.cpu_start,
            gen_seconds=self.gen_seconds,
            update_seconds=seconds - self.inputs_seconds,
            gen_tokens=self.gen_tokens,
            update_tokens=self.update_tokens,
            score=self.score,
        )

    def generate(self, prompts: list[Any]) -> tuple[Any, ...]:
        """GRPOTrainer._generate: all turns."""
        start = now()
        generated = self._generate(prompts)
        self.gen_seconds += now() - start
        prompt_ids, completion_ids, mask = generated[:3]
        self.gen_tokens += sum(map(sum, mask)) if mask is not None else sum(map(len, completion_ids))
        self.update_tokens += sum(map(len, prompt_ids)) + sum(map(len, completion_ids))
        return generated

    def prepare_inputs(self, generation_batch: Any) -> Any:
        """GRPOTrainer._prepare_inputs: everything before the loss."""
        start = now()
        inputs = self._prepare_inputs(generation_batch)
        self.inputs_seconds += now() - start
        return inputs

    def calculate_rewards(self, *arguments: Any) -> Any:
        """GRPOTrainer._calculate_rewards."""
        rewards = self._calculate_rewards(*arguments)
        self.score = float(rewards.mean())
        return rewards


def now() -> float:
    """Seconds, after what runs on the GPU has ended."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def run_in_turns(ours: Ours, trainer: GRPOTrainer) -> tuple[list[StepTime], list[StepTime]]:
    """TRL trains; before each of its steps ours does the same one. Returns the times of ours and of TRL."""
    from transformers import TrainerCallback

    ours_times: list[StepTime] = []
    trl_times: list[StepTime] = []
    clock = TrlClock(trainer)

    class Turns(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            ours_times.append(ours.step(len(ours_times) + 1))
            clock.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            trl_times.append(clock.end())

    trainer.add_callback(Turns())
    trainer.train()
    return ours_times, trl_times


def bench_steps(args: argparse.Namespace) -> dict[str, Any]:
    """Step times of both trainers, as a report."""
    shape = SHAPES[args.model_shape]
    overrides = [*shape.overrides, f"data.train_batch_size={args.prompts}", f"actor_rollout_ref.rollout.n={args.samples}"]
    overrides.append(f"trainer.num_threads={args.threads}")
    with tempfile.TemporaryDirectory() as work:
        work_dir = Path(work)
        if shape.random is not None:
            save_random_base(shape.random, shape.mean_response, work_dir / "base")
            overrides.append(f"actor_rollout_ref.model.path={work_dir / 'base'}")
        ours = Ours(overrides, hash_score if shape.random is not None else None)
        trainer = make_trl_trainer(ours, shape, args.warmup + args.steps, work_dir / "trl")
        ours_times, trl_times = run_in_turns(ours, trainer)
    ours_summary, trl_summary = summary(ours_times[args.warmup :]), summary(trl_times[args.warmup :])
    return {
        "model_shape": args.model_shape,
        "parameters": sum(p.numel() for p in trainer.accelerator.unwrap_model(trainer.model).get_base_model().parameters()),
        "rollouts": args.prompts * args.samples,
        "steps": args.steps,
        "threads": args.threads,
        "device": ours.placement.device,
        "ours": ours_summary,
        "trl": trl_summary,
        "ratio": {name: ours_summary[name] / trl_summary[name] for name in SECONDS},
    }


def summary(times: Sequence[StepTime]) -> dict[str, float]:
    """Medians of seconds; tokens a step and a second over all steps."""

    def mean(name: str) -> float:
        return statistics.mean(getattr(step, name) for step in times)

    return {
        "step_s": statistics.median(step.seconds for step in times),
        "cpu_s": statistics.median(step.cpu_seconds for step in times),
        "gen_s": statistics.median(step.gen_seconds for step in times),
        "update_s": statistics.median(step.update_seconds for step in times),
        "gen_tokens_per_s": mean("gen_tokens") / mean("gen_seconds"),
        "update_tokens_per_s": mean("update_tokens") / mean("update_seconds"),
        "gen_tokens": mean("gen_tokens"),
        "update_tokens": mean("update_tokens"),
        "score": mean("score"),
    }


def wait_for_line(command: Sequence[str], cwd: Path, file: Path) -> float:
    """Seconds from starting `command` until `file` holds a whole line; then lets the command end by itself."""
    start = time.perf_counter()
    with (cwd / "output.txt").open("wb") as output:
        process = subprocess.Popen(command, cwd=cwd, stdout=output, stderr=subprocess.STDOUT)
        while not (file.is_file() and b"\n" in file.read_bytes()):
            if process.poll() is not None:
                raise SystemExit(f"{' '.join(command)} ended with {process.returncode}:\n{(cwd / 'output.txt').read_text()}")
            time.sleep(0.01)
        seconds = time.perf_counter() - start
        process.wait()
    return seconds


def cost_of_parts(line_file: Path) -> None:
    """The yardstick: import torch, transformers and peft once, start Ray, and do one step in this process."""
    import ray

    for name in ("torch", "transformers", "peft"):
        importlib.import_module(name)
    ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    Ours([], None).step(1)
    line_file.write_text("done\n", encoding="utf-8")
    ray.shutdown()


def bench_startup(runs: int) -> dict[str, Any]:
    """From the command to the first finished step, beside the cost of its parts, in turns."""
    first_step: list[float] = []
    parts: list[float] = []
    words = ("total_training_steps=1", "val_before_train=false", "test_freq=-1", "default_local_dir=run")
    run_command = [sys.executable, "-m", "agentlightning.verl", *(f"trainer.{word}" for word in words)]
    parts_command = [sys.executable, str(Path(__file__).resolve()), "--parts-child", "done"]
    for run in range(runs):
        with tempfile.TemporaryDirectory() as work:
            first_step.append(wait_for_line(run_command, Path(work), Path(work) / "run" / "metrics.jsonl"))
            parts.append(wait_for_line(parts_command, Path(work), Path(work) / "done"))
        print(f"run {run + 1}: first step after {first_step[-1]:.1f} s, its parts {parts[-1]:.1f} s", flush=True)
    ours_s, parts_s = statistics.median(first_step), statistics.median(parts)
    return {"first_step_s": ours_s, "parts_s": parts_s, "ratio": ours_s / parts_s, "runs": runs}


def print_steps(report: Mapping[str, Any]) -> None:
    """The report in lines."""
    print(
        f"{report['model_shape']}: {report['parameters'] / 1e6:.1f} M parameters with LoRA, {report['rollouts']} rollouts a "
        f"step, {report['threads']} thread(s), {report['device']}, median of {report['steps']} steps each, in turns"
    )
    others = ("gen_tokens_per_s", "update_tokens_per_s", "gen_tokens", "update_tokens")
    print(" " * 6 + "".join(f"{name:>10}" for name in (*SECONDS, "score")) + "".join(f"{name:>21}" for name in others))
    for side in ("ours", "trl"):
        row = report[side]
        seconds = "".join(f"{row[name]:10.3f}" for name in SECONDS)
        print(f"{side:6}{seconds}{row['score']:10.2f}" + "".join(f"{row[name]:21.0f}" for name in others))
    print("ratio " + "".join(f"{report['ratio'][name]:10.2f}" for name in SECONDS))


def main() -> None:
    """Bench and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-shape", choices=sorted(SHAPES), default="tiny")
    parser.add_argument("--prompts", type=int, default=8, help="a step")
    parser.add_argument("--samples", type=int, default=8, help="of each prompt")
    parser.add_argument("--steps", type=int, default=10, help="measured")
    parser.add_argument("--warmup", type=int, default=2, help="steps before those")
    parser.add_argument("--threads", type=int, default=1, help="of each")
    parser.add_argument("--startup", action="store_true", help="measure the first step of a run instead")
    parser.add_argument("--runs", type=int, default=3, help="of --startup")
    parser.add_argument("--json", type=Path, help="write the report there too")
    parser.add_argument("--parts-child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.parts_child is not None:
        return cost_of_parts(args.parts_child)
    if args.startup:
        report = bench_startup(args.runs)
        print(f"first step {report['first_step_s']:.1f} s, parts {report['parts_s']:.1f} s, ratio {report['ratio']:.2f}")
    else:
        report = bench_steps(args)
        print_steps(report)
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
