"""Memory of a model that is not trained here, computed on the meta device: what fits on a card. One job a card; the paper's table marks it so."""

PLANNED = {"model": "llama-7b", "gpus": ["rtx4090", "rtx5090"], "seq": 1024}
PLANS = expand(f"{RESULTS}/plan/{PLANNED['model']}-{{gpu}}.json", gpu=PLANNED["gpus"])


rule plan:
    output:
        "results/{tier}/plan/{model}-{gpu}.json",
    log:
        "logs/{tier}/plan/{model}-{gpu}.log",
    benchmark:
        "logs/{tier}/plan/{model}-{gpu}.tsv"
    wildcard_constraints:
        model=PLANNED["model"],
        gpu="|".join(PLANNED["gpus"]),
    threads: 1
    resources:
        mem_mb=2000,
        runtime=10,
    params:
        code=jobs.planner_code(),
        seq=PLANNED["seq"],
    message:
        "Computing what {wildcards.model} needs on {wildcards.gpu}"
    shell:
        "OMP_NUM_THREADS={threads} python -m mango.cli plan --model {wildcards.model} --gpu {wildcards.gpu} --seq {params.seq} --json"
        " > {output} 2> {log}"
