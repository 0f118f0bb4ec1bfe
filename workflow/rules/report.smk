"""Text at the head of the report. ``snakemake --report report.html`` writes it once the targets exist: ``make paper`` and ``make smoke`` do."""


report: "../report/workflow.rst"
