"""Decode each experiment's data set once, before parallel jobs would; the record names what was found and its fingerprint."""


rule data:
    input:
        lambda w: jobs.base(TIER_CONFIG, w.experiment),  # whose tokenizer reads the text
    output:
        "results/{tier}/data/{experiment}.json",
    log:
        "logs/{tier}/data/{experiment}.log",
    benchmark:
        "logs/{tier}/data/{experiment}.tsv"
    threads: 1
    resources:
        mem_mb=4000,
        runtime=60,
    params:
        code=lambda w: jobs.data_code(TIER_CONFIG, w.experiment),
        settings=lambda w: DATA[w.experiment],
        file=SETTINGS_FILE,
    message:
        "Preparing the data of {wildcards.experiment}"
    shell:
        "OMP_NUM_THREADS={threads} python workflow/scripts/prepare_data.py {wildcards.experiment} --config {params.file} --out {output} > {log} 2>&1"
