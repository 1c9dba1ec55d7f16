// Sends each request on stdin, a JSON list, to the URL with Hugging Face's client, as its documentation has it. Prints a
// JSON list: what the client returned, or the message and status of the error it threw.
import { InferenceClient } from "@huggingface/inference";
import { readFileSync } from "node:fs";

const client = new InferenceClient().endpoint(process.argv[2]);
const outcomes = [];
for (const request of JSON.parse(readFileSync(0, "utf8"))) {
  try {
    // It asks again after a 503 at once and for ever, unless told not to.
    outcomes.push({ output: await client.summarization(request, { retry_on_error: false }) });
  } catch (error) {
    outcomes.push({ error: error.message, status: error.httpResponse?.status });
  }
}
console.log(JSON.stringify(outcomes));
