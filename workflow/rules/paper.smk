"""The manuscript: every number, table, verdict and theorem statement is generated, then typeset; a PDF with an undefined reference, an
overfull line or a missing value is refused."""

GENERATED = f"paper/generated/{TIER}"
PDF = "paper/build/mango.pdf" if TIER == "laptop" else f"paper/build/{TIER}/mango.pdf"


rule numbers:
    input:
        numbers=expand(f"{RESULTS}/figures/{{notebook}}/numbers.json", notebook=NOTEBOOKS),
        theory=expand(f"{RESULTS}/theory/{{theorem}}.json", theorem=jobs.theorems(TIER_CONFIG)),
        plans=PLANS,
        statements=jobs.unchecked_statements(TIER_CONFIG),
        reported="paper/reported.json",
    output:
        expand(
            f"{GENERATED}/{{file}}",
            file=["numbers.json", "variables.tex", "theorems.tex", "claims.tex", "provenance.tex"],
        ),
    log:
        f"{LOGS}/paper/numbers.log",
    benchmark:
        f"{LOGS}/paper/numbers.tsv"
    threads: 1
    resources:
        mem_mb=2000,
        runtime=10,
    params:
        code=jobs.generator_code(),
        tier=TIER,
        benchmarks=LOGS,
    message:
        "Generating the paper's numbers, tables and statements"
    shell:
        "python workflow/scripts/paper_generate.py --tier {params.tier} --benchmarks {params.benchmarks} > {log} 2>&1"


rule paper:
    input:
        generated=rules.numbers.output,
        sources=jobs.paper_sources(),
    output:
        report(PDF, category="Paper", caption="../report/paper.rst"),
    log:
        f"{LOGS}/paper/latex.log",
    benchmark:
        f"{LOGS}/paper/latex.tsv"
    threads: 1
    resources:
        mem_mb=2000,
        runtime=10,
    params:
        code=jobs.paper_code(),
        tier=TIER,
    message:
        "Typesetting {output}"
    shell:
        "python workflow/scripts/paper_build.py --tier {params.tier} > {log} 2>&1"
