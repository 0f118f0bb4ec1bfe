"""Policies: the evaluation belongs to the tier; `snakemake policy` makes the shipped policies anew, from traces to PPO.

`snakemake policy` ends in results/<tier>/policy/{tinyformer,lstm,scratch}.safetensors, of which the first two are copied to mango/policy/
by hand: ordinary runs judge what is shipped and do not depend on training it. The others (scratch, which is PPO alone, and the clones, which
are imitation alone) are trained only in a tier whose evaluation names them.
"""

POLICY = f"{RESULTS}/policy"


# Learner -> its kind and the clone that PPO starts from.
LEARNERS = {
    "tinyformer": ("tinyformer", f"{POLICY}/cloned-tinyformer.safetensors"),
    "lstm": ("lstm", f"{POLICY}/cloned-lstm.safetensors"),
    "scratch": ("tinyformer", None),
}


wildcard_constraints:
    kind="tinyformer|lstm",
    learner="tinyformer|lstm|scratch",


rule policy_evaluation:
    input:
        jobs.policy_files(TIER_CONFIG),
    output:
        f"{POLICY}/evaluation.json",
    log:
        f"{LOGS}/policy/evaluation.log",
    benchmark:
        f"{LOGS}/policy/evaluation.tsv"
    threads: 1
    resources:
        mem_mb=3000,
        runtime=30,
    params:
        code=jobs.policy_code(TIER_CONFIG),
        settings=jobs.policy_settings(TIER_CONFIG),
        file=SETTINGS_FILE,
    message:
        "Judging policies on held-out tasks"
    shell:
        "OMP_NUM_THREADS={threads} python workflow/scripts/policy.py evaluate --config {params.file} --out {output} > {log} 2>&1"


rule policy_traces:
    output:
        file=f"{POLICY}/traces.safetensors",
        more=f"{POLICY}/traces.json",
    log:
        f"{LOGS}/policy/traces.log",
    benchmark:
        f"{LOGS}/policy/traces.tsv"
    threads: 1
    resources:
        mem_mb=3000,
        runtime=120,
    params:
        code=jobs.policy_code(TIER_CONFIG),
        settings=jobs.policy_settings(TIER_CONFIG),
        file=SETTINGS_FILE,
    message:
        "Recording experts"
    shell:
        "OMP_NUM_THREADS={threads} python workflow/scripts/policy.py traces --config {params.file} --out {output.file} > {log} 2>&1"


rule policy_imitation:
    input:
        rules.policy_traces.output.file,
    output:
        file=f"{POLICY}/cloned-{{kind}}.safetensors",
        more=f"{POLICY}/cloned-{{kind}}.json",
    log:
        f"{LOGS}/policy/imitation-{{kind}}.log",
    benchmark:
        f"{LOGS}/policy/imitation-{{kind}}.tsv"
    threads: 1
    resources:
        mem_mb=3000,
        runtime=120,
    params:
        code=jobs.policy_code(TIER_CONFIG),
        settings=jobs.policy_settings(TIER_CONFIG),
        file=SETTINGS_FILE,
    message:
        "Cloning experts: {wildcards.kind}"
    shell:
        "OMP_NUM_THREADS={threads} python workflow/scripts/policy.py imitate --config {params.file} --traces {input} --kind {wildcards.kind}"
        " --out {output.file} > {log} 2>&1"


rule policy_ppo:
    input:
        lambda wildcards: LEARNERS[wildcards.learner][1] or [],
    output:
        file=f"{POLICY}/{{learner}}.safetensors",
        more=f"{POLICY}/{{learner}}.jsonl",
    log:
        f"{LOGS}/policy/ppo-{{learner}}.log",
    benchmark:
        f"{LOGS}/policy/ppo-{{learner}}.tsv"
    threads: jobs.policy_workers(TIER_CONFIG)
    resources:
        mem_mb=3000,
        runtime=240,
    params:
        code=jobs.policy_code(TIER_CONFIG),
        settings=jobs.policy_settings(TIER_CONFIG),
        file=SETTINGS_FILE,
        kind=lambda wildcards: LEARNERS[wildcards.learner][0],
        start=lambda wildcards, input: f"--start {input}" if input else "",
    message:
        "Improving a policy by PPO: {wildcards.learner}"
    shell:
        "OMP_NUM_THREADS=1 python workflow/scripts/policy.py ppo --config {params.file} {params.start} --kind {params.kind}"
        " --out {output.file} > {log} 2>&1"


rule policy:
    input:
        expand(rules.policy_ppo.output.file, learner=LEARNERS),
    log:
        f"{LOGS}/policy/all.log",
    message:
        "The policies are trained"
    shell:
        "echo {input} > {log}"
