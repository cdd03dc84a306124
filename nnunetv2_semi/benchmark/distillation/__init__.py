"""Distillation of trained models into one plain nnU-Net, and what it costs and gains."""
