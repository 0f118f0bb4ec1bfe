"""Learning rates: ``snakemake tuning`` runs every variant's ``grid`` on data held out of the training set, never on the test set. The chosen
values are written into the tier's file by hand, so that ordinary runs do not depend on this."""


rule tune:
    input:
        "results/{tier}/data/{experiment}.json",
    output:
        "results/{tier}/tuning/{experiment}/{variant}.json",
    log:
        "logs/{tier}/tuning/{experiment}/{variant}.log",
    benchmark:
        "logs/{tier}/tuning/{experiment}/{variant}.tsv"
    threads: lambda w: TIER_CONFIG.experiments[w.experiment].train.threads
    resources:
        mem_mb=3000,
        runtime=lambda w: 5 * jobs.minutes(TIER_CONFIG, w.experiment),
        gpu=int(TIER == "gpu"),
    params:
        code=lambda w: jobs.run_code(TIER_CONFIG, w.experiment, w.variant),
        settings=lambda w: jobs.grid_settings(TIER_CONFIG, w.experiment, w.variant),
        file=SETTINGS_FILE,
    message:
        "Tuning {wildcards.experiment}: {wildcards.variant}"
    shell:
        "OMP_NUM_THREADS={threads} python workflow/scripts/tune.py {wildcards.experiment} --config {params.file}"
        " --variant {wildcards.variant} --out {output} > {log} 2>&1"


rule tuning:
    input:
        [
            f"{RESULTS}/tuning/{experiment}/{variant}.json"
            for experiment, chosen in TIER_CONFIG.experiments.items()
            for variant, recipe in chosen.variants.items()
            if recipe.grid
        ],
    output:
        f"{RESULTS}/tuning/all.json",
    log:
        f"{LOGS}/tuning/all.log",
    message:
        "Gathering the tuned values in {output}"
    shell:
        "python workflow/scripts/tune.py --gather {input} --out {output} > {log} 2>&1"
