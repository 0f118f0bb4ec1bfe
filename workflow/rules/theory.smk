"""One job per theorem: proof steps, measurement of mango's own operators against the bound, negative control."""


rule theory:
    output:
        report(
            "results/{tier}/theory/{theorem}.json",
            category="Theorems",
            labels={"theorem": "{theorem}"},
            caption="../report/theorem.rst",
        ),
    log:
        "logs/{tier}/theory/{theorem}.log",
    benchmark:
        "logs/{tier}/theory/{theorem}.tsv"
    wildcard_constraints:
        theorem=r"T\d+",
    threads: 1
    resources:
        mem_mb=3000,
        runtime=30,
    params:
        code=lambda w: jobs.theorem_code(w.theorem),
        seed=TIER_CONFIG.theory.seed,
        out=subpath(output[0], parent=True),
    message:
        "Checking theorem {wildcards.theorem}"
    shell:
        "OMP_NUM_THREADS={threads} python -m theory --only {wildcards.theorem} --seed {params.seed} --out {params.out} > {log} 2>&1"
