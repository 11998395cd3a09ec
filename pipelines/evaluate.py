"""`acestep-ray evaluate` as a script, for `ray job submit -- python pipelines/evaluate.py …`."""

from acestep_ray.cli import run_pipeline

if __name__ == "__main__":
    run_pipeline("evaluate")
