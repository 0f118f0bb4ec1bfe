"""Training: one configuration (``config``), one loop (``loop``), atomic checkpoints, one run record (``record``), one judge (``judge``)."""
