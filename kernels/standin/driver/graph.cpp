// Capture of streams into graphs. A graph is the captured work in the order of
// its submission: one of the orders that the real one may run in.
#include "state.h"

namespace standin {

static thread_local int thread_mode = GLOBAL;

bool spoils_a_capture() {
  if (thread_mode == RELAXED) return false;
  bool spoiled = false;
  for (auto& stream : all_streams()) {
    if (!stream->capture || !stream->origin) continue;
    Graph& graph = *stream->capture;
    const bool is_own = graph.owner == std::this_thread::get_id();
    if (graph.mode == GLOBAL || (is_own && graph.mode == THREAD_LOCAL)) spoiled = graph.invalid = true;
  }
  return spoiled;
}

}  // namespace standin

using namespace standin;

API cuThreadExchangeStreamCaptureMode(int* mode) {
  ENTER("cuThreadExchangeStreamCaptureMode");
  if (!mode || *mode < GLOBAL || *mode > RELAXED) return INVALID_VALUE;
  std::swap(*mode, thread_mode);
  return SUCCESS;
}

API cuStreamBeginCapture_v2(void* handle, int mode) {
  ENTER("cuStreamBeginCapture");
  auto stream = state().streams.get(handle);  // not the null stream
  if (!stream) return handle ? INVALID_HANDLE : CAPTURE_UNSUPPORTED;
  if (stream->capture || mode < GLOBAL || mode > RELAXED) return INVALID_VALUE;
  stream->capture = std::make_shared<Graph>();
  stream->capture->mode = mode;
  stream->capture->owner = std::this_thread::get_id();
  stream->origin = true;
  return SUCCESS;
}

API cuStreamIsCapturing(void* handle, int* status) {
  ENTER("cuStreamIsCapturing");
  auto stream = stream_of(handle);
  if (!stream) return INVALID_HANDLE;
  *status = !stream->capture ? 0 : stream->capture->invalid ? 2 : 1;
  return SUCCESS;
}

API cuStreamEndCapture(void* handle, void** out) {
  ENTER("cuStreamEndCapture");
  auto stream = state().streams.get(handle);
  if (!stream) return INVALID_HANDLE;
  if (!stream->capture || !stream->origin || !out) return INVALID_VALUE;
  const std::shared_ptr<Graph> graph = stream->capture;
  if (graph->mode != RELAXED && graph->owner != std::this_thread::get_id()) return CAPTURE_WRONG_THREAD;
  for (auto& other : all_streams()) {
    if (other->capture == graph) other->capture = nullptr;
  }
  stream->origin = false;
  *out = nullptr;
  if (graph->invalid) return CAPTURE_INVALIDATED;
  *out = state().graphs.add(graph);
  return SUCCESS;
}

static Result instantiate(void** out, void* handle) {
  auto graph = state().graphs.get(handle);
  if (!graph || !out) return INVALID_VALUE;
  *out = state().executables.add(std::make_shared<Graph>(*graph));
  return SUCCESS;
}

API cuGraphInstantiateWithFlags(void** out, void* handle, unsigned long long) {
  ENTER("cuGraphInstantiateWithFlags");
  BESIDE_SPINS("cuGraphInstantiateWithFlags");
  return instantiate(out, handle);
}

API cuGraphGetNodes(void* handle, void** nodes, size_t* count) {
  ENTER("cuGraphGetNodes");
  auto graph = state().graphs.get(handle);
  if (!graph || nodes || !count) return INVALID_VALUE;  // only their number
  *count = graph->work.size();
  return SUCCESS;
}

API cuGraphUpload(void* handle, void* stream) {
  ENTER("cuGraphUpload");
  return state().executables.get(handle) && stream_of(stream) ? SUCCESS : INVALID_HANDLE;
}

API cuGraphLaunch(void* handle, void* stream_handle) {
  ENTER("cuGraphLaunch");
  auto graph = state().executables.get(handle);
  auto stream = stream_of(stream_handle);
  if (!graph || !stream) return INVALID_HANDLE;
  for (const Work& work : graph->work) {
    if (Result code = enqueue(stream, work)) return code;
  }
  finish_launch(stream);
  return SUCCESS;
}

API cuGraphDestroy(void* handle) {
  ENTER("cuGraphDestroy");
  return state().graphs.remove(handle) ? SUCCESS : INVALID_VALUE;
}

API cuGraphExecDestroy(void* handle) {
  ENTER("cuGraphExecDestroy");
  return state().executables.remove(handle) ? SUCCESS : INVALID_VALUE;
}
