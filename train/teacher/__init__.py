"""What the student is compared with: a model, a recording, or an engine that runs the model elsewhere.

signals           live, recorded or served, one interface
prompt_scores     what is made of log-probabilities of prompts
server            a server of vLLM that tells them
in_process        vLLM that does so here
agreement         lets either in once it says what the teacher says
recording_plan    what identifies it and what of it is missing
recording_format  how it lies on the disk
recording_reader  reads it in training
wiring            student, teacher and the loss between them
"""
