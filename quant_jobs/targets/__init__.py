"""One file per target: how its engine directory is built. `quant_jobs/build.py` chooses; targets
import neither the job nor its workers."""
