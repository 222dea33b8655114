"""What the student is compared with: a model or a recording.

signals           live or recorded, one interface
vllm_teacher      vLLM in this process, let in once it says what transformers computes
recording_plan    what identifies it and what of it is missing
recording_format  how it lies on the disk
recording_reader  reads it in training
wiring            student, teacher and the loss between them
"""
