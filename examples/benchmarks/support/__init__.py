"""What `finetune.py` is made of: tasks from packages or from the Hub, the run, its checks, its report."""
