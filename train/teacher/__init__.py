"""What the student is compared with: a model or a recording.

signals       live or recorded, one interface
vllm_teacher  vLLM in this process, let in once it says what transformers computes
recording     what identifies a recording, and how it lies on the disk
wiring        student, teacher and the loss between them
"""
