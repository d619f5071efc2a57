import sys, time, numpy as np, onnxruntime as ort
from worker import serve, timed_generation


def main(d, threads):
    t = time.perf_counter()
    so = ort.SessionOptions()
    so.intra_op_num_threads = threads
    s = ort.InferenceSession(d + "/model.onnx", so, providers=["CPUExecutionProvider"])
    load = time.perf_counter() - t
    names = [i.name for i in s.get_inputs()]

    def describe():
        return {"engine": "ort", "load_s": load}

    def generate(prompt, new_tokens):
        kv = {n: np.zeros((1, 3, 0, 64), np.float32) for n in names if "past" in n}

        def toks(kv):
            ids = np.array([prompt])
            total = 0
            while True:
                total += ids.shape[1]
                f = {"input_ids": ids, "attention_mask": np.ones((1, total), np.int64), **kv}
                o = s.run(None, f)
                outn = [x.name for x in s.get_outputs()]
                r = dict(zip(outn, o))
                kv = {n: r[n.replace("past_key_values", "present")] for n in kv}
                tok = int(r["logits"][0, -1].argmax())
                yield tok
                ids = np.array([[tok]])

        return {**timed_generation(toks(kv), time.perf_counter(), new_tokens), "setup_s": 0.0}

    serve({"describe": describe, "generate": generate})


main(sys.argv[1], int(sys.argv[2]))
