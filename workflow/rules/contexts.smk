"""Memory against context length, and the longest context under a cap: one job, so that methods are timed beside each other."""

if TIER_CONFIG.contexts is not None:

    rule contexts:
        output:
            expand(f"{RESULTS}/contexts/{{method}}/0/{{file}}", method=jobs.METHODS, file=["run.json", "metrics.jsonl"]),
        log:
            f"{LOGS}/contexts.log",
        benchmark:
            f"{LOGS}/contexts.tsv"
        threads: 1
        resources:
            mem_mb=4000,
            runtime=60,
            gpu=int(TIER == "gpu"),
        params:
            code=jobs.contexts_code(),
            arguments=jobs.contexts_arguments(TIER_CONFIG),
            out=lambda wildcards, output: output[0].split("/contexts/")[0],
        message:
            "Measuring memory against context length"
        shell:
            "OMP_NUM_THREADS={threads} python workflow/scripts/contexts.py {params.arguments} --out {params.out} > {log} 2>&1"
