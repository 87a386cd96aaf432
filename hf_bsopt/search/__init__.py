"""From a workload and a device to the batch size. Front door: pipeline.py."""
