"""Memory of models that are not trained here, computed on the meta device: what fits on a card. One job a card; the paper's tables mark it so."""

# Model -> cards, tokens, and arguments that name the methods; without any the usual ones.
PLANNED = {
    "llama-7b": (["rtx4090", "rtx5090"], 1024, ""),
    "nanochat-d12": (["rtx5090"], 8192, "--method adamw --method mango+fused+int2 --method mango+fused+int2-hidden"),
}
PLANS = [f"{RESULTS}/plan/{model}-{gpu}.json" for model, (gpus, _, _) in PLANNED.items() for gpu in gpus]


rule plan:
    output:
        "results/{tier}/plan/{model}-{gpu}.json",
    log:
        "logs/{tier}/plan/{model}-{gpu}.log",
    benchmark:
        "logs/{tier}/plan/{model}-{gpu}.tsv"
    wildcard_constraints:
        model="|".join(PLANNED),
        gpu="rtx4090|rtx5090",
    threads: 1
    resources:
        mem_mb=2000,
        runtime=10,
    params:
        code=jobs.planner_code(),
        seq=lambda w: PLANNED[w.model][1],
        methods=lambda w: PLANNED[w.model][2],
    message:
        "Computing what {wildcards.model} needs on {wildcards.gpu}"
    shell:
        "OMP_NUM_THREADS={threads} python -m mango.cli plan --model {wildcards.model} --gpu {wildcards.gpu} --seq {params.seq} {params.methods} --json"
        " > {output} 2> {log}"
