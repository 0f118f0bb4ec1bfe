"""Policies: the evaluation belongs to the tier; `snakemake policy` makes the shipped policy anew, from traces to PPO.

`snakemake policy` ends in results/<tier>/policy/tinyformer.safetensors, which is copied to mango/policy/ by hand: ordinary runs judge what
is shipped and do not depend on training it.
"""

POLICY = f"{RESULTS}/policy"


rule policy_evaluation:
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
        file=f"{POLICY}/cloned.safetensors",
        more=f"{POLICY}/cloned.json",
    log:
        f"{LOGS}/policy/imitation.log",
    benchmark:
        f"{LOGS}/policy/imitation.tsv"
    threads: 1
    resources:
        mem_mb=3000,
        runtime=120,
    params:
        code=jobs.policy_code(TIER_CONFIG),
        settings=jobs.policy_settings(TIER_CONFIG),
        file=SETTINGS_FILE,
    message:
        "Cloning experts"
    shell:
        "OMP_NUM_THREADS={threads} python workflow/scripts/policy.py imitate --config {params.file} --traces {input} --out {output.file} > {log} 2>&1"


rule policy_ppo:
    input:
        rules.policy_imitation.output.file,
    output:
        file=f"{POLICY}/tinyformer.safetensors",
        more=f"{POLICY}/tinyformer.jsonl",
    log:
        f"{LOGS}/policy/ppo.log",
    benchmark:
        f"{LOGS}/policy/ppo.tsv"
    threads: 1
    resources:
        mem_mb=3000,
        runtime=240,
    params:
        code=jobs.policy_code(TIER_CONFIG),
        settings=jobs.policy_settings(TIER_CONFIG),
        file=SETTINGS_FILE,
    message:
        "Improving the policy by PPO"
    shell:
        "OMP_NUM_THREADS={threads} python workflow/scripts/policy.py ppo --config {params.file} --start {input} --out {output.file} > {log} 2>&1"


rule policy:
    input:
        rules.policy_ppo.output.file,
    log:
        f"{LOGS}/policy/all.log",
    message:
        "The policy is trained"
    shell:
        "echo {input} > {log}"
