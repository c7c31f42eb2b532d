"""The pictures with which a course shows what mini-batch SGD does, each from runs of the trainer."""
