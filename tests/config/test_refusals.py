"""Every refusal through the real command line: exit code 2, one last line that names the flag, nothing created."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from string import Template

import pytest

from tests.config.inputs import Result, run_train

BASE = (
    "--hf-checkpoint $hf --prompt-data $prompts --rollout-batch-size 4 --num-rollout 2 --run-dir $run --rm-type exact "
)
MEGATRON = BASE + "--use-opd --opd-type megatron --opd-teacher-load $teacher "
SGLANG = BASE + "--use-opd --opd-type sglang --opd-teacher-url http://127.0.0.1:1 "
WHOLE = "--num-layers 4 --hidden-size 32 --ffn-hidden-size 48 --num-attention-heads 4 --num-query-groups 2 "

# (arguments, texts that the line must hold); a text that starts with ! must not stand there
CASES: dict[str, tuple[str, tuple[str, ...]]] = {
    "misspelt flag": (BASE + "--use-odp", ("--use-odp", "did you mean --use-opd?")),
    "misspelt flags and values": (
        BASE + "--opd-tpe megatron --lr fast --rollout-top-p 1.5 --seed 1.5",
        ("--opd-tpe: unknown flag (did you mean --opd-type?)", "--lr fast", "--rollout-top-p 1.5", "--seed 1.5"),
    ),
    "abbreviated flag": (BASE + "--use-op", ("--use-op: unknown flag", "--use-opd")),
    "underscores": (BASE + "--rollout_top_k -1", ("--rollout_top_k", "did you mean --rollout-top-k?", "!unexpected")),
    "one minus": (BASE + "-use-opd", ("-use-opd: unknown flag (did you mean --use-opd?)",)),
    "flag without value": (BASE + "--load --use-opd", ("--load: needs a value",)),
    "empty value": (BASE + "--load=", ("--load", "is empty")),
    "left-over argument": (BASE + "--use-opd yes", ("'yes'", "--use-opd is a switch")),
    "unknown opd type": (BASE + "--use-opd --opd-type sglan", ("--opd-type sglan", "choose sglang or megatron")),
    "unknown reward": (BASE + "--rm-type gsm8", ("--rm-type gsm8", "math, gsm8k, exact", "did you mean gsm8k?")),
    "negative coefficient": (MEGATRON + "--opd-kl-coef -0.5", ("--opd-kl-coef -0.5: must be at least 0",)),
    "infinite coefficient": (MEGATRON + "--opd-kl-coef inf", ("--opd-kl-coef inf: must be finite",)),
    "minus infinite coefficient": (MEGATRON + "--opd-kl-coef -inf", ("--opd-kl-coef -inf: must be finite",)),
    "nan coefficient": (MEGATRON + "--opd-kl-coef nan", ("--opd-kl-coef nan: must be finite",)),
    "other coefficients": (
        BASE + "--kl-coef -1 --entropy-coef nan --kl-loss-coef -1e-3 --eps-clip-c 1",
        ("--kl-coef -1", "--entropy-coef nan", "--kl-loss-coef -1e-3", "--eps-clip-c 1: must be above 1"),
    ),
    "a sum of one divergence": (
        MEGATRON + "--opd-loss distribution --opd-divergence jsd --opd-divergence-to jsd --opd-divergence-mix 0",
        ("--opd-divergence-to jsd is the first divergence again", "--opd-divergence-mix 0 gives --opd-divergence-to"),
    ),
    "a policy loss of advantages that are 0": (
        MEGATRON + "--advantage-estimator none --opd-loss distribution --policy-loss gspo --use-tis --eps-clip 0.1",
        (
            "--policy-loss has no effect: with --opd-loss distribution and no task reward",
            "--use-tis has no effect: with --opd-loss distribution and no task reward no mean over sampled tokens",
            "--eps-clip has no effect: with",
        ),
    ),
    "whitening of advantages that are 0": (
        MEGATRON + "--advantage-estimator none --opd-importance --normalize-advantages",
        ("--normalize-advantages has no effect: with --opd-importance and no task reward",),
    ),
    "clipping of labels": (
        BASE.replace("--rm-type exact", "") + "--loss-type sft_loss --label-key label --eps-clip-high 0.3 --gamma 0.9",
        ("--eps-clip-high has no effect with --loss-type sft_loss", "--gamma has no effect with --loss-type sft_loss"),
    ),
    "outcomes of unfinished responses": (
        MEGATRON + "--advantage-estimator none --rollout-max-response-len 8 --opd-prefix-len 4 --opd-on incorrect "
        "--opd-mask-truncated --opd-mask-longer-than 4",
        (
            "--opd-prefix-len leaves responses unfinished, of which no reward can judge: leave out --opd-on",
            "--opd-mask-truncated leaves out every response that --opd-prefix-len ends",
            "--opd-mask-longer-than 4 has no effect with --opd-prefix-len 4",
        ),
    ),
    "tokens chosen by a teacher that is not the target": (
        MEGATRON + "--opd-reward-scale 1.5 --opd-token-select top --opd-token-score soft_or --opd-token-ratio 0.5",
        ("--opd-token-score soft_or is a distance from the teacher, beyond which --opd-reward-scale goes",),
    ),
    "a policy loss of rewards that are 0": (
        MEGATRON.replace("--rm-type exact", "--rm-type zero") + "--opd-loss distribution --policy-loss cispo",
        ("--policy-loss has no effect: with",),
    ),
    "tokens of a server's diagnostics": (
        SGLANG + "--opd-diagnostics-interval 1 --opd-diagnostics-top-k 4",
        ("--opd-diagnostics-top-k has no effect with --opd-type sglang",),
    ),
    "absurd numbers": (
        BASE + f"--seed {10**30} --num-rollout {2**31} --opd-teacher-timeout 1e30 --distributed-timeout-minutes 1e300 "
        "--lr 1e300",
        (
            f"--seed {10**30}: must be at most 2147483647",
            f"--num-rollout {2**31}: must be at most",
            "--opd-teacher-timeout 1e30: must be at most 1e+07",
            "--distributed-timeout-minutes 1e300: must be at most",
            "--lr 1e300: is too large for a 32-bit number",
        ),
    ),
    "server flags that are set": (
        BASE + "--rollout-engine sglang --sglang-server-args=--port=1",
        ("--sglang-server-args --port=1: --port is set already: a free one is taken",),
    ),
    "a key among server flags": (
        BASE + "--rollout-engine sglang --sglang-server-args=--admin-api-key=s3cret",
        ("--sglang-server-args ***: --admin-api-key is set already: the servers listen", "!s3cret"),
    ),
    "abbreviated server flags": (
        BASE + "--rollout-engine sglang --sglang-server-args=--tensor-parallel=2",
        ("--sglang-server-args --tensor-parallel=2: --tensor-parallel-size is set already: use --rollout-num-gpus",),
    ),
    "server flags that are none": (BASE + "--sglang-server-args=x", ("must begin with a flag",)),
    "unknown flag of the server": (
        BASE + "--sglang-mem-fraction-statik 0.5",
        ("--sglang-mem-fraction-statik: unknown flag (did you mean --sglang-mem-fraction-static?)",),
    ),
    "engines on the trainer's GPUs": (
        BASE + "--rollout-engine sglang --sglang-base-gpu-id 4 --rollout-num-engines 2 --actor-num-gpus-per-node 8",
        ("--sglang-base-gpu-id 4: the rollout engines would have GPUs 4 to 5 of this machine and the trainer 0 to 7",),
    ),
    "servers without their engine": (
        BASE + "--rollout-num-engines 2 --sglang-free-memory",
        ("--rollout-num-engines goes with --rollout-engine sglang only", "--sglang-free-memory goes with"),
    ),
    "servers started and given": (
        BASE + "--rollout-engine sglang --rollout-engine-url http://127.0.0.1:1 --rollout-num-engines 2",
        ("--rollout-num-engines has no effect on the servers of --rollout-engine-url",),
    ),
    "a key for servers of the run's own": (
        BASE + "--rollout-engine sglang --rollout-engine-api-key-env KEY",
        ("--rollout-engine-api-key-env goes with --rollout-engine-url only",),
    ),
    "a folder that no weights go through": (
        BASE + "--rollout-engine sglang --rollout-weight-transfer distributed --rollout-weights-dir w",
        ("--rollout-weights-dir has no effect with --rollout-weight-transfer distributed",),
    ),
    "batches of the local engine": (
        BASE + "--rollout-engine sglang --rollout-engine-batch-size 4",
        ("--rollout-engine-batch-size is for the local engine",),
    ),
    "servers without samples": (
        BASE + "--rollout-engine sglang --loss-type sft_loss",
        ("--rollout-engine sglang has nothing to sample with --loss-type sft_loss",),
    ),
    "top-k of zero": (BASE + "--rollout-top-k 0", ("--rollout-top-k 0: must be -1 (off) or at least 1",)),
    "chat template arguments": (
        BASE + "--apply-chat-template --apply-chat-template-kwargs [1]",
        ("--apply-chat-template-kwargs [1]: must be a JSON mapping",),
    ),
    "import path": (BASE + "--custom-rm-path pkg.mod.function", ("--custom-rm-path", "package.module:function")),
    "odd evaluation pair": (BASE + "--eval-prompt-data $prompts", ("--eval-prompt-data: takes 2 values", "NAME PATH")),
    "not a url": (
        BASE + "--use-opd --opd-type sglang --opd-teacher-url user:secret@host:30000",
        ("--opd-teacher-url", "http://127.0.0.1:30000", "!secret"),
    ),
    "url without host": (
        BASE + "--use-opd --opd-type sglang --opd-teacher-url http://:30000",
        ("--opd-teacher-url http://:30000",),
    ),
    "opd without type": (BASE + "--use-opd", ("--use-opd needs --opd-type: choose sglang or megatron",)),
    "megatron without teacher": (
        BASE + "--use-opd --opd-type megatron",
        ("--opd-type megatron needs --opd-teacher-load",),
    ),
    "extrapolated top tokens": (
        MEGATRON + "--opd-reward-scale 1.25 --opd-loss distribution --opd-support teacher_topk --opd-top-k 4",
        ("--opd-reward-scale 1.25 with --opd-loss distribution needs --opd-support full",),
    ),
    "extrapolated baseline": (
        MEGATRON + "--opd-reward-scale 1.25 --opd-baseline kl",
        ("--opd-reward-scale 1.25 does not go with --opd-baseline",),
    ),
    "extrapolated and entropy-aware": (
        MEGATRON + "--opd-reward-scale 1.25 --opd-loss distribution --opd-entropy-aware 0.5",
        ("--opd-reward-scale 1.25 does not go with --opd-entropy-aware",),
    ),
    "more teachers that nothing mixes": (
        MEGATRON + "--opd-more-teachers $teacher_hf",
        ("--opd-more-teachers needs --opd-teacher-mixture: choose arithmetic or geometric",),
    ),
    "a mixture of one": (
        MEGATRON + "--opd-teacher-mixture arithmetic",
        ("--opd-teacher-mixture arithmetic has a single teacher: add --opd-more-teachers",),
    ),
    "a mixture of one server": (
        SGLANG + "--opd-teacher-mixture geometric",
        ("--opd-teacher-mixture geometric has a single teacher: add an --opd-teachers file of several",),
    ),
    "more teachers than servers load": (
        SGLANG + "--opd-more-teachers $teacher_hf --opd-teacher-mixture geometric",
        ("--opd-more-teachers goes with --opd-type megatron only",),
    ),
    "weights of a mixture": (
        MEGATRON + "--opd-more-teachers $teacher_hf --opd-teacher-mixture geometric --opd-teacher-weights 1 2 3",
        ("--opd-teacher-weights names 3 weights for 2 teachers",),
    ),
    "weights below 0": (
        MEGATRON + "--opd-more-teachers $teacher_hf --opd-teacher-mixture geometric --opd-teacher-weights 1 -2",
        ("--opd-teacher-weights -2: must be above 0",),
    ),
    "weights of no mixture": (
        MEGATRON + "--opd-teacher-weights 1 2",
        ("--opd-teacher-weights has no effect without --opd-teacher-mixture",),
    ),
    "a mixture of top tokens": (
        MEGATRON + "--opd-more-teachers $teacher_hf --opd-teacher-mixture arithmetic --opd-loss distribution "
        "--opd-support teacher_topk --opd-top-k 4 --opd-entropy-aware 0.5",
        (
            "--opd-teacher-mixture arithmetic with --opd-loss distribution needs --opd-support full",
            "--opd-teacher-mixture arithmetic does not go with --opd-entropy-aware",
        ),
    ),
    "the baseline of a geometric mixture": (
        MEGATRON + "--opd-more-teachers $teacher_hf --opd-teacher-mixture geometric --opd-baseline kl",
        ("--opd-teacher-mixture geometric does not go with --opd-baseline",),
    ),
    "another teacher that is not there": (
        MEGATRON + "--opd-more-teachers $teacher_hf nowhere --opd-teacher-mixture geometric",
        ("--opd-more-teachers nowhere does not exist",),
    ),
    "another teacher that does not fit": (
        MEGATRON + "--opd-more-teachers $three_layers --opd-teacher-mixture geometric "
        "--pipeline-model-parallel-size 2 --actor-num-gpus-per-node 2",
        ("does not divide the teacher's 3 layers",),
    ),
    "the prompt's sampled tokens": (
        MEGATRON + "--opd-include-prompt",
        ("--opd-include-prompt needs --opd-loss distribution: the prompt's tokens are not the student's samples",),
    ),
    "a server's prompts": (
        SGLANG + "--opd-include-prompt --opd-loss distribution --opd-support teacher_topk --opd-top-k 4",
        ("--opd-include-prompt needs --opd-type megatron",),
    ),
    "a reference for nothing": (
        MEGATRON + "--opd-ref-load $teacher",
        ("--opd-ref-load has no effect with --opd-reward-scale 1",),
    ),
    "a reference that is not there": (
        SGLANG + "--opd-reward-scale 2 --opd-ref-load nowhere",
        ("--opd-ref-load nowhere does not exist",),
    ),
    "a reference without weights": (
        SGLANG + "--opd-reward-scale 2 --opd-ref-load $config_only",
        ("--opd-ref-load", "config_only holds no complete checkpoint"),
    ),
    "extrapolation without a reference": (
        SGLANG.replace("$hf", "$config_only") + "--opd-reward-scale 2",
        ("--opd-reward-scale needs a reference: give --ref-load",),
    ),
    "sglang with load": (
        SGLANG + "--opd-teacher-load $teacher",
        ("--opd-teacher-load goes with --opd-type megatron only",),
    ),
    "virtual stages without a pipeline": (
        BASE + "--num-layers-per-virtual-pipeline-stage 1",
        ("--num-layers-per-virtual-pipeline-stage needs --pipeline-model-parallel-size above 1",),
    ),
    "virtual stages that do not fit": (
        BASE + "--pipeline-model-parallel-size 2 --actor-num-gpus-per-node 2 --rollout-batch-size 4 "
        "--num-layers-per-virtual-pipeline-stage 3",
        ("must divide the 2 layers of a pipeline rank",),
    ),
    "context parallelism of padded sequences": (
        BASE + "--context-parallel-size 2 --actor-num-gpus-per-node 2 --qkv-format bshd",
        ("--context-parallel-size splits packed sequences",),
    ),
    "context parallelism that does not fit": (
        BASE + "--context-parallel-size 3 --actor-num-gpus-per-node 2",
        ("--context-parallel-size 3 does not divide the 2 ranks",),
    ),
    "dynamic batches without a size": (
        BASE + "--use-dynamic-batch-size",
        ("--use-dynamic-batch-size needs --max-tokens-per-gpu",),
    ),
    "dynamic batches of two sizes": (
        BASE + "--use-dynamic-batch-size --max-tokens-per-gpu 64 --micro-batch-size 2",
        ("--micro-batch-size has no effect with --use-dynamic-batch-size",),
    ),
    "tokens without dynamic batches": (
        BASE + "--max-tokens-per-gpu 64",
        ("--max-tokens-per-gpu has no effect without --use-dynamic-batch-size",),
    ),
    "gradients in float32 as they are": (
        BASE + "--accumulate-allreduce-grads-in-fp32",
        ("--accumulate-allreduce-grads-in-fp32 has no effect without --bf16",),
    ),
    "overlapped gather alone": (
        BASE + "--overlap-param-gather",
        ("--overlap-param-gather needs --use-distributed-optimizer and --overlap-grad-reduce",),
    ),
    "weights without distillation": (
        BASE + "--opd-token-select top --opd-prompt-weight paced --opd-on correct",
        (
            "--opd-token-select has no effect without --use-opd",
            "--opd-prompt-weight has no effect without --use-opd",
            "--opd-on has no effect without --use-opd",
        ),
    ),
    "weights of supervised training": (
        MEGATRON + "--loss-type sft_loss --opd-token-select top",
        ("--use-opd does not go with --loss-type sft_loss",),
    ),
    "selection options without selection": (
        MEGATRON + "--opd-token-score soft_or --opd-token-ratio 0.3",
        (
            "--opd-token-score has no effect with --opd-token-select all: choose top or sample",
            "--opd-token-ratio has no effect with --opd-token-select all",
        ),
    ),
    "selection of everything": (
        MEGATRON + "--opd-token-select top --opd-token-ratio 1",
        ("--opd-token-ratio 1: must be below 1",),
    ),
    "floor of the highest scores": (
        MEGATRON + "--opd-token-select top --opd-token-floor 0.2",
        ("--opd-token-floor goes with --opd-token-select sample only",),
    ),
    "hard cut-off of sampled tokens": (
        MEGATRON + "--opd-token-select sample --opd-token-min-score 0.2",
        ("--opd-token-min-score is a hard cut-off, which --opd-token-select sample cannot make up for",),
    ),
    "sampled tokens without a floor": (
        MEGATRON + "--opd-token-select sample --opd-token-floor 0",
        ("--opd-token-floor 0: must be above 0",),
    ),
    "scores of distributions that are not there": (
        SGLANG + "--opd-token-select top --opd-token-score divergence",
        ("--opd-token-score divergence compares whole distributions", "use --opd-token-score entropy"),
    ),
    "scores of a teacher that is not there": (
        MEGATRON + "--load-debug-rollout-data $recorded --opd-token-select top --opd-token-score soft_or",
        ("--opd-token-score soft_or compares whole distributions",),
    ),
    "paced options without paced": (
        MEGATRON + "--opd-paced-alpha 2 --opd-pass-rate running",
        (
            "--opd-paced-alpha has no effect without --opd-prompt-weight paced: add it",
            "--opd-pass-rate has no effect without --opd-prompt-weight paced",
        ),
    ),
    "pass rates of small groups": (
        MEGATRON + "--opd-prompt-weight paced --n-samples-per-prompt 3",
        ("--opd-pass-rate group needs --n-samples-per-prompt of at least 4: it is 3",),
    ),
    "pass rates of no task": (
        MEGATRON + "--opd-prompt-weight paced --opd-pass-rate running --rm-type zero",
        ("--opd-pass-rate running needs a task reward",),
    ),
    "key of pass rates that are not in the metadata": (
        MEGATRON + "--opd-prompt-weight paced --n-samples-per-prompt 4 --opd-pass-rate-key p",
        ("--opd-pass-rate-key goes with --opd-pass-rate metadata only",),
    ),
    "paced without powers": (
        MEGATRON + "--opd-prompt-weight paced --n-samples-per-prompt 4 --opd-paced-alpha 0 --opd-paced-beta 0",
        ("--opd-paced-alpha 0 and --opd-paced-beta 0 give every prompt the same weight",),
    ),
    "weights of rewards that are all 0": (
        MEGATRON + "--opd-on incorrect --opd-reward-beta 1 --rm-type zero",
        ("--opd-on incorrect needs a task reward", "--opd-reward-beta needs a task reward"),
    ),
    "weights of rewards of one sample": (
        MEGATRON + "--opd-reward-beta 1",
        ("--opd-reward-beta has no effect with --n-samples-per-prompt 1",),
    ),
    "a pass that nobody asks for": (
        MEGATRON + "--opd-pass-above 0.6",
        ("--opd-pass-above has no effect without --opd-on",),
    ),
    "a mask of what cannot be": (
        MEGATRON + "--rollout-max-response-len 16 --opd-mask-longer-than 16",
        ("--opd-mask-longer-than 16 has no effect with --rollout-max-response-len 16",),
    ),
    "sglang with a baseline": (SGLANG + "--opd-baseline kl", ("--opd-baseline goes with --opd-type megatron only",)),
    "baseline from a recording": (
        MEGATRON + "--opd-baseline kl --load-debug-rollout-data $run/{rollout_id}.jsonl",
        ("--opd-baseline kl needs the teacher itself",),
    ),
    "teacher of a recording": (
        MEGATRON + "--opd-teacher-tensor-model-parallel-size 2 --opd-exact-kl-interval 5 "
        "--load-debug-rollout-data $recorded",
        (
            "--opd-teacher-load has no effect with --load-debug-rollout-data",
            "--opd-teacher-tensor-model-parallel-size has no effect with",
            "--opd-exact-kl-interval has no effect with",
        ),
    ),
    "server of a recording": (
        SGLANG + "--load-debug-rollout-data $recorded",
        ("--opd-teacher-url has no effect with --load-debug-rollout-data",),
    ),
    "sglang without url": (BASE + "--use-opd --opd-type sglang", ("--opd-type sglang needs --opd-teacher-url",)),
    "url and file of teachers": (
        SGLANG + "--opd-teachers $root/none.yaml --opd-teacher-api-key-env KEY",
        (
            "--opd-teacher-url does not go with --opd-teachers",
            "--opd-teacher-api-key-env does not go with --opd-teachers",
            "none.yaml: cannot be read",
        ),
    ),
    "routes that no teacher has": (
        BASE + "--prompt-data $routed --use-opd --opd-type sglang --opd-teachers $teachers --dry-run",
        (
            "routed.jsonl, line 2: the metadata field 'teacher' is missing, --opd-teachers has math or code",
            "routed.jsonl, line 3: the metadata field 'teacher' is 'maths', --opd-teachers has math or code",
            "routed.jsonl, line 4: the metadata field 'teacher' is ['math'], --opd-teachers has",
        ),
    ),
    "routes under another field": (
        BASE + "--prompt-data $routed@[0:1] --use-opd --opd-type sglang --opd-teachers $teachers "
        "--opd-teacher-route-key subject",
        ("routed.jsonl, line 1: the metadata field 'subject' is missing",),
    ),
    "route without teachers": (SGLANG + "--opd-teacher-route-key field", ("--opd-teacher-route-key has no effect",)),
    "a key in place of its variable": (
        SGLANG + "--opd-teacher-api-key-env sk-verysecret",
        ("must be the name of an environment variable", "!verysecret"),
    ),
    "megatron with server options": (
        MEGATRON + "--opd-overlong mask --opd-teachers $root/none.yaml --opd-max-union-ids 3",
        ("--opd-overlong goes with", "--opd-teachers goes with", "--opd-max-union-ids goes with"),
    ),
    "sglang with step": (SGLANG + "--opd-teacher-ckpt-step 5", ("--opd-teacher-ckpt-step goes with",)),
    "megatron with url": (MEGATRON + "--opd-teacher-url http://h:2", ("--opd-teacher-url goes with --opd-type sgl",)),
    "megatron with timeout": (MEGATRON + "--opd-teacher-timeout 3", ("--opd-teacher-timeout goes with",)),
    "sglang with a precision": (
        SGLANG + "--opd-teacher-dtype bfloat16 --opd-teacher-micro-batch-size 2 --opd-teacher-max-tokens-per-gpu 64",
        (
            "--opd-teacher-dtype goes with --opd-type megatron only",
            "--opd-teacher-micro-batch-size goes",
            "--opd-teacher-max-tokens-per-gpu goes",
        ),
    ),
    "two sizes of the teacher's micro-batches": (
        MEGATRON + "--opd-teacher-micro-batch-size 2 --opd-teacher-max-tokens-per-gpu 64 --qkv-format bshd",
        ("both size the teacher's micro-batches", "--opd-teacher-max-tokens-per-gpu counts packed tokens"),
    ),
    "precision of hidden states that nobody keeps": (
        MEGATRON + "--opd-exact-kl-interval 0 --opd-teacher-hidden-dtype bfloat16",
        ("--opd-teacher-hidden-dtype has no effect",),
    ),
    "teacher layout that does not fit": (
        MEGATRON + "--actor-num-gpus-per-node 2 --opd-teacher-tensor-model-parallel-size 3",
        (
            "--opd-teacher-tensor-model-parallel-size 3 x --opd-teacher-pipeline-model-parallel-size 1 (as of",
            "does not divide the 2 ranks",
            "--opd-teacher-tensor-model-parallel-size 3 does not divide the teacher's",
        ),
    ),
    "teacher layout with sglang": (
        SGLANG + "--opd-teacher-pipeline-model-parallel-size 2",
        ("--opd-teacher-pipeline-model-parallel-size goes with --opd-type megatron only",),
    ),
    "nobody to offload": (BASE + "--offload-teacher", ("--offload-teacher has no effect",)),
    "nothing to hold": (BASE + "--offload-dir $root/away", ("--offload-dir has nothing to hold",)),
    "offload to a file": (BASE + "--offload-train --offload-dir $file", ("--offload-dir", "is a file")),
    "opd options without opd": (
        BASE + "--opd-type megatron --opd-kl-coef 1.0 --opd-teacher-load nowhere --opd-allow-sampling-mismatch",
        (
            "--opd-type has no effect without --use-opd",
            "--opd-kl-coef has no",
            "--opd-teacher-load has no",
            "--opd-allow-sampling-mismatch has no",
            "!does not exist",
        ),
    ),
    "opd with sft": (MEGATRON + "--loss-type sft_loss", ("--use-opd does not go with --loss-type sft_loss",)),
    "nothing to learn from": (BASE + "--advantage-estimator none", ("--advantage-estimator none leaves nothing",)),
    "sglang temperature": (SGLANG + "--rollout-temperature 0.7", ("--rollout-temperature 0.7", "sampling-mismatch")),
    "sglang top-p": (SGLANG + "--rollout-top-p 0.9", ("--rollout-top-p 0.9", "--opd-allow-sampling-mismatch")),
    "megatron top-p and top-k": (
        MEGATRON + "--rollout-top-p 0.9 --rollout-top-k 20 --rollout-temperature 0.7",
        ("--rollout-top-p 0.9", "--rollout-top-k 20", "!--rollout-temperature"),
    ),
    "no teacher folder": (
        BASE + "--use-opd --opd-type megatron --opd-teacher-load $root/nowhere",
        ("--opd-teacher-load", "does not exist"),
    ),
    "empty teacher folder": (
        BASE + "--use-opd --opd-type megatron --opd-teacher-load $empty",
        ("--opd-teacher-load", "holds no complete checkpoint"),
    ),
    "torn teacher": (
        BASE + "--use-opd --opd-type megatron --opd-teacher-load $torn",
        ("--opd-teacher-load", "holds no complete checkpoint", "__0_0.distcp has 63 bytes instead of 64"),
    ),
    "teacher without weights": (
        BASE + "--use-opd --opd-type megatron --opd-teacher-load $config_only",
        ("--opd-teacher-load", "holds no complete checkpoint"),
    ),
    "torn hf teacher": (
        BASE + "--use-opd --opd-type megatron --opd-teacher-load $torn_hf",
        ("--opd-teacher-load", "holds no complete checkpoint", "model.safetensors has"),
    ),
    "teacher file": (BASE + "--use-opd --opd-type megatron --opd-teacher-load $file", ("--opd-teacher-load", "a file")),
    "teacher step": (
        MEGATRON + "--opd-teacher-ckpt-step 7",
        ("--opd-teacher-ckpt-step", "step 7 is not in", "(it has 5, 10)"),
    ),
    "step of an hf teacher": (
        BASE + "--use-opd --opd-type megatron --opd-teacher-load $teacher_hf --opd-teacher-ckpt-step 7",
        ("--opd-teacher-ckpt-step", "has no step 7"),
    ),
    "teacher without config": (
        BASE + "--use-opd --opd-type megatron --opd-teacher-load $no_config",
        ("--opd-teacher-load", "carries no config"),
    ),
    "no student": (BASE + "--hf-checkpoint $root/nowhere", ("--hf-checkpoint", "does not exist")),
    "student without config": (BASE + "--hf-checkpoint $empty", ("--hf-checkpoint", "no config.json", "no tokenizer")),
    "student without tokenizer": (BASE + "--hf-checkpoint $no_tokenizer", ("--hf-checkpoint", "holds no tokenizer")),
    "torn student": (BASE + "--hf-checkpoint $torn_hf", ("--hf-checkpoint", "model.safetensors has")),
    "student not in safetensors": (BASE + "--hf-checkpoint $bin", ("--hf-checkpoint", "pytorch_model.bin")),
    "no reference folder": (BASE + "--ref-load $root/nowhere", ("--ref-load", "does not exist")),
    "empty reference folder": (BASE + "--ref-load $empty", ("--ref-load", "holds no complete checkpoint")),
    "torn resume": (BASE + "--load $torn", ("--load", "holds no complete checkpoint", "63 bytes")),
    "step of a resume": (BASE + "--load $checkpoint --ckpt-step 6", ("--ckpt-step", "not in", "(it has 5, 10)")),
    "step without resume": (BASE + "--load $root/nowhere --ckpt-step 6", ("--ckpt-step", "no complete checkpoint")),
    "step without load": (BASE + "--ckpt-step 6", ("--ckpt-step is a step of --load",)),
    "ways to load nothing": (
        BASE + "--finetune --no-load-optim --no-load-rng",
        (
            "--finetune says how --load is read",
            "--no-load-optim says how --load is read",
            "--no-load-rng says how --load is read",
            "--finetune loads weights alone: leave out --no-load-optim and --no-load-rng",
        ),
    ),
    "finetune from nothing": (BASE + "--load $root/nowhere --finetune", ("--finetune has no weights to begin from",)),
    "retained steps that are never saved": (
        BASE + "--save-interval 4 --save-retain-interval 10",
        ("--save-retain-interval 10 must be a multiple of --save-interval",),
    ),
    "no prompts": (BASE + "--prompt-data $root/nowhere.jsonl", ("--prompt-data", "no such file")),
    "empty prompts": (BASE + "--prompt-data $empty_prompts", ("--prompt-data", "no rows")),
    "bad prompts": (BASE + "--prompt-data $bad_prompts", ("--prompt-data", "line 2", "line 3", "--input-key")),
    "no labels": (BASE + "--prompt-data $unlabelled", ("--prompt-data", "line 1", "--label-key")),
    "no evaluation prompts": (
        BASE + "--eval-prompt-data dev $root/nowhere.jsonl",
        ("--eval-prompt-data dev", "no such file"),
    ),
    "no recorded rollouts": (
        BASE + "--load-debug-rollout-data $root/data_{rollout_id}.jsonl",
        ("--load-debug-rollout-data", "data_"),
    ),
    "run dir is a file": (BASE + "--run-dir $file/run", ("--run-dir", "is a file")),
    "save over the teacher": (MEGATRON + "--save $teacher", ("--save", "--opd-teacher-load", "overwritten")),
    "global batch": (BASE + "--global-batch-size 3", ("--global-batch-size 3 does not divide the 4 samples",)),
    "micro batch": (
        BASE + "--micro-batch-size 3",
        ("--micro-batch-size 3 x 1 data-parallel ranks", "choose a multiple of 3"),
    ),
    "data parallel": (
        BASE + "--actor-num-gpus-per-node 8",
        ("--micro-batch-size 1 x 8 data-parallel ranks", "--rollout-batch-size 4"),
    ),
    "world size": (
        BASE + "--tensor-model-parallel-size 2 --actor-num-gpus-per-node 3",
        ("--tensor-model-parallel-size 2", "--pipeline-model-parallel-size 1", "3 ranks"),
    ),
    "tensor parallel": (
        BASE + "--tensor-model-parallel-size 4 --actor-num-gpus-per-node 4",
        ("--tensor-model-parallel-size 4 does not divide the model's 2 query groups", "!heads"),
    ),
    "tensor parallel of three": (
        BASE + "--tensor-model-parallel-size 5 --actor-num-gpus-per-node 5",
        ("4 attention heads", "48 feed-forward"),
    ),
    "pipeline parallel": (
        BASE + "--pipeline-model-parallel-size 3 --actor-num-gpus-per-node 3",
        ("--pipeline-model-parallel-size 3 does not divide the model's 4 layers",),
    ),
    "teacher layout": (
        MEGATRON + "--pipeline-model-parallel-size 4 --actor-num-gpus-per-node 4",
        ("--opd-teacher-pipeline-model-parallel-size 4 (as of the student) does not divide the teacher's 6 layers",),
    ),
    "sequence parallel": (BASE + "--sequence-parallel", ("--sequence-parallel needs --tensor-model-parallel-size",)),
    "recompute": (
        BASE + "--recompute-granularity full",
        ("--recompute-granularity full needs --recompute-method", "needs --recompute-num-layers"),
    ),
    "selective recompute": (
        BASE + "--recompute-granularity selective --recompute-num-layers 1",
        ("--recompute-num-layers",),
    ),
    "model arguments": (
        BASE + "--num-layers 6 --hidden-size 64 --rotary-base 10000 --add-qkv-bias --vocab-size 100",
        (
            "--num-layers 6 (config: 4)",
            "--hidden-size 64 (config: 32)",
            "--rotary-base 10000.0 (config: 1000000.0)",
            "--add-qkv-bias (config: False)",
            "!--vocab-size",
        ),
    ),
    "whole model arguments": (
        BASE + WHOLE,
        ("--qk-layernorm is missing", "--kv-channels is missing", "--group-query-attention is missing"),
    ),
    "unsupported model": (BASE + "--hf-checkpoint $llama", ("--hf-checkpoint", "hidden_act 'gelu'")),
    "other reference model": (BASE + "--ref-load $other", ("--ref-load", "hidden_size 64 (not 32)", "vocab_size 101")),
    "reference without weights": (
        BASE + "--hf-checkpoint $config_only --use-kl-loss",
        ("--use-kl-loss needs a reference", "--ref-load"),
    ),
    "reward kl without reference": (
        BASE + "--hf-checkpoint $config_only --kl-coef 0.1",
        ("--kl-coef needs a reference", "--ref-load"),
    ),
    "kl loss options": (
        BASE + "--kl-loss-coef 0.1 --kl-loss-type k2",
        ("--kl-loss-coef has no effect", "--kl-loss-type has no effect"),
    ),
    "corrections that are off": (
        BASE + "--tis-level sequence --tis-clip 3 --opsm-delta 0.1",
        ("--tis-level has no effect without --use-tis", "--tis-clip has no", "--opsm-delta has no effect without"),
    ),
    "bounds of weights": (BASE + "--use-tis --tis-clip 0.5 --tis-clip-low 0.6", ("--tis-clip-low 0.6 is above",)),
    "masking on policy": (BASE + "--use-opsm", ("--use-opsm has no effect with one optimizer",)),
    "forms of the term": (
        MEGATRON + "--opd-loss distribution --opd-kl-discount 0.5 --opd-kl-loss-type k1",
        ("--opd-kl-discount goes with --opd-loss sampled only", "--opd-kl-loss-type goes with --opd-loss kl_loss only"),
    ),
    "a divergence of sampled tokens": (
        MEGATRON + "--opd-divergence jsd",
        ("--opd-divergence goes with --opd-loss distribution only",),
    ),
    "parameters of another divergence": (
        MEGATRON + "--opd-loss distribution --opd-jsd-beta 0.3 --opd-skew 0.2",
        (
            "--opd-jsd-beta goes with --opd-divergence jsd only",
            "--opd-skew goes with --opd-divergence skew_kl or skew_reverse_kl only",
        ),
    ),
    "half a mixture": (
        MEGATRON + "--opd-loss distribution --opd-divergence-mix 0.5",
        ("--opd-divergence-mix needs --opd-divergence-to",),
    ),
    "a schedule of nothing": (
        MEGATRON + "--opd-loss distribution --opd-divergence jsd --opd-divergence-schedule 0:9",
        ("--opd-divergence-schedule has nothing to change: name a second divergence with --opd-divergence-to",),
    ),
    "a beta that changes the size of the loss": (
        MEGATRON + "--opd-loss distribution --opd-divergence jsd --opd-jsd-beta-end 0.5",
        (
            "--opd-jsd-beta-end needs --opd-divergence-schedule: say over which rollouts",
            "--opd-jsd-beta-end needs --opd-jsd-scaled",
            "--opd-jsd-beta-end 0.5 is where --opd-jsd-beta begins",
        ),
    ),
    "a changing beta of another divergence": (
        MEGATRON + "--opd-loss distribution --opd-jsd-beta-end 1 --opd-jsd-scaled --opd-divergence-schedule 0:9",
        ("--opd-jsd-beta-end goes with --opd-divergence jsd only",),
    ),
    "a second divergence without weight": (
        MEGATRON + "--opd-loss distribution --opd-divergence-to forward_kl",
        ("--opd-divergence-to needs --opd-divergence-mix, --opd-divergence-schedule or both",),
    ),
    "a schedule that is none": (
        MEGATRON + "--opd-loss distribution --opd-divergence-to forward_kl --opd-divergence-schedule 9:3",
        ("--opd-divergence-schedule 9:3: must be written START:END",),
    ),
    "a support without a size": (
        MEGATRON + "--opd-loss distribution --opd-support student_topk",
        ("--opd-support student_topk needs --opd-top-k",),
    ),
    "a tail of the whole vocabulary": (
        MEGATRON + "--opd-loss distribution --opd-tail renormalized",
        ("--opd-tail has no effect with --opd-support full",),
    ),
    "importance with a discount": (
        MEGATRON + "--opd-importance --opd-kl-discount 1 --opd-baseline kl",
        ("--opd-importance does not go with --opd-kl-discount", "--opd-importance does not go with --opd-baseline"),
    ),
    "half a line of coefficients": (
        MEGATRON + "--opd-kl-coef-end 0.1",
        ("--opd-kl-coef-end and --opd-kl-coef-rollouts go together",),
    ),
    "a server's whole distribution": (
        SGLANG + "--opd-loss distribution",
        ("--opd-loss distribution over the whole vocabulary needs --opd-type megatron",),
    ),
    "a server at the student's tokens": (
        SGLANG
        + "--opd-loss distribution --opd-support student_topk --opd-top-k 40 --opd-max-union-ids 32 "
        + "--opd-overlong drop",
        (
            "--opd-top-k 40 asks a server for more than --opd-max-union-ids 32 ids",
            "--opd-overlong drop does not go with",
        ),
    ),
    "a server's tail at another temperature": (
        SGLANG + "--opd-loss distribution --opd-support teacher_topk --opd-top-k 4 --opd-temperature 2",
        ("--opd-temperature 2 with --opd-type sglang needs --opd-tail renormalized",),
    ),
    "two estimators": (
        BASE + "--advantage-estimator rloo --custom-advantage-path pkg:function",
        ("--advantage-estimator and --custom-advantage-path both name",),
    ),
    "two policy losses": (
        BASE + "--policy-loss gspo --custom-loss-path pkg:function",
        ("--policy-loss and --custom-loss-path both name",),
    ),
    "dual clip without clip": (BASE + "--policy-loss cispo --eps-clip-c 3", ("--eps-clip-c bounds a clipped",)),
    "two averages": (
        BASE + "--calculate-per-token-loss --loss-length-divisor 10",
        ("--calculate-per-token-loss and --loss-length-divisor",),
    ),
    "passes over labels": (BASE + "--loss-type sft_loss --ppo-epochs 2", ("--ppo-epochs has no effect with",)),
    "critic without ppo": (
        BASE + "--lambd 0.9 --critic-lr 1e-5 --num-critic-only-steps 1",
        (
            "--lambd has no effect without --advantage-estimator ppo",
            "--critic-lr has no effect",
            "--num-critic-only-steps has no effect",
        ),
    ),
    "critic without rewards": (
        BASE.replace("--rm-type exact", "--rm-type zero") + "--advantage-estimator ppo",
        ("--advantage-estimator ppo has nothing to value with --rm-type zero: use --advantage-estimator none",),
    ),
    "critic that trains alone": (
        BASE + "--advantage-estimator ppo --num-critic-only-steps 2",
        ("--num-critic-only-steps 2 leaves none of the 2 rollouts to the student", "!--lr-warmup-iters"),
    ),
    "rates of a critic": (
        BASE + "--advantage-estimator ppo --lr-warmup-init 1e-7 --critic-lr 1e-8 --critic-min-lr 1e-7 "
        "--critic-lr-warmup-iters 2",
        (
            "--critic-min-lr 1e-07 is above --critic-lr 1e-08",
            "--lr-warmup-init 1e-07 is above --critic-lr 1e-08",
            "--critic-lr-warmup-iters 2 must be shorter than the decay of 2 optimizer steps",
        ),
    ),
    "weights of a critic": (
        BASE + "--advantage-estimator ppo --critic-load $root/nowhere",
        ("--critic-load", "nowhere is no folder: name that of a checkpoint"),
    ),
    "values of a critic": (
        BASE + "--advantage-estimator ppo --lambd 1.1 --value-clip -1",
        ("--lambd 1.1: must be at most 1", "--value-clip -1: must be at least 0"),
    ),
    "gamma of another": (BASE + "--advantage-estimator rloo --gamma 0.9", ("--gamma belongs to",)),
    "reward kl without reward": (MEGATRON + "--advantage-estimator none --kl-coef 0.1", ("--kl-coef", "none ignores")),
    "kl with sft": (BASE + "--loss-type sft_loss --use-kl-loss", ("--use-kl-loss has no effect with --loss-type",)),
    "learning rates": (
        BASE + "--lr 1e-6 --min-lr 1e-5 --lr-warmup-init 1",
        ("--min-lr 1e-05 is above", "--lr-warmup-init 1 is above"),
    ),
    "warm-up": (BASE + "--lr-warmup-iters 2", ("--lr-warmup-iters 2 must be shorter", "2 optimizer steps")),
    "two warm-ups": (BASE + "--lr-warmup-iters 1 --lr-warmup-fraction 0.1", ("--lr-warmup-fraction and",)),
    "distributed sgd": (BASE + "--optimizer sgd --use-distributed-optimizer", ("--use-distributed-optimizer",)),
    "two lengths": (BASE + "--num-epoch 1", ("--num-rollout and --num-epoch",)),
    "misspelt functions": (
        BASE.replace("--rm-type exact", "--custom-rm-path json:juge --dry-run")
        + "--custom-advantage-path no_such_module:f --dynamic-filter-path json:dumps.not --custom-loss-path json:dumps "
        "--custom-generate-function-path json:__name__",
        (
            "--custom-rm-path json:juge: json has no juge",
            "--custom-advantage-path no_such_module:f: cannot import no_such_module",
            "--dynamic-filter-path json:dumps.not: json has no dumps.not",
            "--custom-generate-function-path json:__name__: __name__ is not a function",
            "!--custom-loss-path",
        ),
    ),
    "two rewards": (BASE + "--custom-rm-path pkg:function", ("--rm-type and --custom-rm-path",)),
    "reward of an error": (BASE + "--rm-error-value -1", ("--rm-error-value has no effect",)),
    "evaluation of nothing": (BASE + "--eval-interval 5", ("--eval-interval", "--eval-prompt-data")),
    "evaluation twice": (
        BASE + "--eval-prompt-data dev $prompts --eval-prompt-data dev $prompts",
        ("--eval-prompt-data dev is given",),
    ),
    "evaluation without engine": (
        BASE + "--load-debug-rollout-data $recorded --eval-prompt-data dev $prompts",
        ("--eval-prompt-data needs",),
    ),
    "template arguments without template": (
        BASE + """--apply-chat-template-kwargs {"a":1}""",
        ("--apply-chat-template-kwargs has no effect",),
    ),
    "one file for all rollouts": (BASE + "--save-debug-rollout-data data.jsonl", ("{rollout_id}",)),
    "epochs of nothing": (
        "--hf-checkpoint $hf --load-debug-rollout-data $recorded --num-epoch 1",
        ("--num-epoch counts passes",),
    ),
    "missing options": (
        "",
        (
            "--hf-checkpoint",
            "--prompt-data",
            "--rollout-batch-size",
            "--num-rollout",
            "--num-epoch",
            "--run-dir",
            "--rm-type",
            "--custom-rm-path",
        ),
    ),
    "missing for recorded": (
        "--load-debug-rollout-data $recorded",
        ("--hf-checkpoint", "--run-dir", "!--prompt-data", "!--rm-type"),
    ),
    "missing for sft": ("--loss-type sft_loss", ("--hf-checkpoint", "--prompt-data", "!--rm-type")),
    "missing for evaluated sft": (
        "--loss-type sft_loss --eval-prompt-data dev $prompts",
        ("--eval-rm-type", "the evaluation needs a reward"),
    ),
    # The order of the stages: the later fault must not show.
    "values before opd": (BASE + "--use-opd --lr x", ("--lr x", "!--opd-type")),
    "opd before paths": (BASE + "--use-opd --load $file", ("--opd-type", "!--load")),
    "paths before the rest": (BASE + "--load $file --global-batch-size 3", ("--load", "!--global-batch-size")),
    "the rest before what is missing": ("--sequence-parallel", ("--sequence-parallel", "!--hf-checkpoint")),
}


@pytest.fixture(scope="module")
def results(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Result, list[Path]]]:
    """Result and created files of every case; they are started two at a time."""
    before = sorted(folders["root"].rglob("*"))
    places = {name: tmp_path_factory.mktemp("case") for name in CASES}

    def run(name: str) -> Result:
        words = [Template(word).substitute(folders | {"run": places[name] / "run"}) for word in CASES[name][0].split()]
        return run_train(words, places[name])

    with ThreadPoolExecutor(2) as pool:
        done = dict(zip(CASES, pool.map(run, CASES), strict=True))
    assert sorted(folders["root"].rglob("*")) == before, "an input folder was changed"
    return {name: (done[name], list(places[name].rglob("*"))) for name in CASES}


@pytest.mark.parametrize("name", CASES)
def test_refusal(name: str, results: dict[str, tuple[Result, list[Path]]]) -> None:
    result, created = results[name]
    assert result.code == 2, result
    assert result.out == ""
    assert result.err.count("\n") == 1, "the fault is one line"
    assert result.last_line.startswith("error: ")
    assert created == []
    for text in CASES[name][1]:
        if text.startswith("!"):
            assert text[1:] not in result.last_line
        else:
            assert text in result.last_line
    if len(CASES[name][1]) > 2 and name.startswith(("misspelt flags", "other coef", "missing options")):
        assert "; " in result.last_line
