"""One job per training run. A run that was cut off resumes from its checkpoint, which is not declared as an output because Snakemake removes
the declared outputs of failed jobs."""


rule train:
    input:
        data="results/{tier}/data/{experiment}.json",
        base=lambda w: jobs.base(TIER_CONFIG, w.experiment),
    output:
        record=report(
            "results/{tier}/{experiment}/{variant}/{seed}/run.json",
            category="Run records",
            subcategory="{experiment}",
            labels={"variant": "{variant}", "seed": "{seed}"},
            caption="../report/run.rst",
        ),
        metrics="results/{tier}/{experiment}/{variant}/{seed}/metrics.jsonl",
    log:
        "logs/{tier}/train/{experiment}/{variant}/{seed}.log",
    benchmark:
        "logs/{tier}/train/{experiment}/{variant}/{seed}.tsv"
    threads: lambda w: TIER_CONFIG.experiments[w.experiment].train.threads
    resources:
        mem_mb=3000,
        runtime=lambda w: jobs.minutes(TIER_CONFIG, w.experiment),
        gpu=int(TIER == "gpu"),
    params:
        code=lambda w: jobs.run_code(TIER_CONFIG, w.experiment, w.variant),
        settings=lambda w: jobs.run_settings(TIER_CONFIG, w.experiment, w.variant),
        file=SETTINGS_FILE,
        out=subpath(output.record, parent=True),
    message:
        "Training {wildcards.experiment}: {wildcards.variant}, seed {wildcards.seed}"
    shell:
        "OMP_NUM_THREADS={threads} bash workflow/scripts/train.sh {params.out} {params.code}-{params.settings:q}"
        " {wildcards.experiment} --config {params.file} --variant {wildcards.variant} --seed {wildcards.seed} > {log} 2>&1"


rule pretrained:
    input:
        "results/{tier}/{experiment}/{variant}/{seed}/run.json",
    output:
        directory("results/{tier}/{experiment}/{variant}/{seed}/pretrained"),
    log:
        "logs/{tier}/pretrained/{experiment}/{variant}/{seed}.log",
    benchmark:
        "logs/{tier}/pretrained/{experiment}/{variant}/{seed}.tsv"
    threads: 1
    resources:
        mem_mb=3000,
        runtime=10,
    params:
        code=jobs.pretrained_code(),
        run=subpath(input[0], parent=True),
    message:
        "Exporting the weights of {wildcards.experiment}: {wildcards.variant}, seed {wildcards.seed}"
    shell:
        "OMP_NUM_THREADS={threads} python workflow/scripts/pretrained.py {params.run} > {log} 2>&1"
