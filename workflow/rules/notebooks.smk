"""Figures and numbers. Notebooks run under papermill; the executed copy is a log, so that a failed one is kept and can be opened."""

# Notebook -> the figures it leaves, each as PDF and PNG.
FIGURES = {
    "00_quickstart": ["loss"],
    "01_cifar10": ["curves", "pareto", "recovered", "contraction"],
    "02_theory": [],
    "03_optimizer": ["pareto", "curves", "recovered", "contraction"],
    "04_molegrad": ["recovered", "kept", "energy", "contexts", "curves"],
    "05_policy": ["costs", "decisions", "attention"],
    "06_vision": ["pareto", "curves_cnn", "curves_vit", "recovered_cnn", "recovered_vit"],
    "07_llama": ["pretrain", "held"],
}
# Figure -> the theorem that it shows: a tier may check a part of them.
SHOWN = {"codecs": "T1", "scouts": "T3", "ef21": "T5", "byzantine": "T6"}
FIGURES["02_theory"] += [figure for figure, theorem in SHOWN.items() if theorem in jobs.theorems(TIER_CONFIG)]
# Notebook -> what it reads: experiments, the contexts, the theorems, or the evaluation of policies. It runs in the tiers that have all of it.
READS = {
    "00_quickstart": (),
    "01_cifar10": ("cifar10",),
    "02_theory": ("theory",),
    "03_optimizer": ("language", "cifar10"),
    "04_molegrad": ("nanochat", "contexts"),
    "05_policy": ("policy",),
    "06_vision": ("imagenet-cnn", "imagenet-vit"),
    "07_llama": ("llama-pretrain", "llama-finetune"),
}
# What it reads besides in the tiers that have it, for one figure more.
ABLATION = [name for name in ("ablation-cifar10", "ablation-language") if name in TIER_CONFIG.experiments]
if ABLATION:
    READS["03_optimizer"] += tuple(ABLATION)
    FIGURES["03_optimizer"].append("ablation")
# What it reads besides: of the tier that has it, and of every archive.
BESIDES = {"07_llama": ("llama-sentiment",)}
NOTEBOOKS = [name for name in FIGURES if jobs.subjects(TIER_CONFIG).issuperset(READS[name])]

for notebook in NOTEBOOKS:

    rule:
        name:
            f"notebook_{notebook}"
        input:
            notebook=f"notebooks/{notebook}.ipynb",
            records=[
                record
                for subject in (*READS[notebook], *BESIDES.get(notebook, ()))
                for record in jobs.notebook_records(TIER_CONFIG, subject)
            ],
        output:
            numbers=f"{RESULTS}/figures/{notebook}/numbers.json",
            pdf=expand(f"{RESULTS}/figures/{notebook}/{{figure}}.pdf", figure=FIGURES[notebook]),
            png=[
                report(
                    f"{RESULTS}/figures/{notebook}/{figure}.png",
                    category="Figures",
                    subcategory=notebook,
                    labels={"figure": figure},
                    caption=f"../report/{notebook}_{figure}.rst",
                )
                for figure in FIGURES[notebook]
            ],
        log:
            notebook=f"{LOGS}/notebooks/{notebook}.ipynb",
            text=f"{LOGS}/notebooks/{notebook}.log",
        benchmark:
            f"{LOGS}/notebooks/{notebook}.tsv"
        threads: 1
        resources:
            mem_mb=3000,
            runtime=20,
        params:
            code=jobs.notebook_code(notebook),
            tier=TIER,
            out=subpath(output.numbers, parent=True),
        message:
            f"Running notebooks/{notebook}.ipynb"
        shell:
            "OMP_NUM_THREADS={threads} papermill {input.notebook} {log.notebook} --kernel python3 --no-progress-bar"
            " -p tier {params.tier} -p results results -p out {params.out} > {log.text} 2>&1"
