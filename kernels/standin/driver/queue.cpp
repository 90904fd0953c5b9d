// Streams and events: work lands when the drain policy says so, at the latest
// when somebody waits for it.
#include <algorithm>
#include <chrono>

#include "state.h"

namespace standin {

static double now_seconds() {
  using namespace std::chrono;
  return duration<double>(steady_clock::now().time_since_epoch()).count();
}

std::shared_ptr<Stream> stream_of(void* handle) {
  // 0 is the null stream, 1 and 2 its names per legacy and per thread.
  if (reinterpret_cast<uintptr_t>(handle) <= 2) return state().null_stream;
  return state().streams.get(handle);
}

std::vector<std::shared_ptr<Stream>> all_streams() {
  std::vector<std::shared_ptr<Stream>> all{state().null_stream};
  for (auto& [handle, stream] : state().streams) all.push_back(stream);
  for (auto& stream : state().leaving) all.push_back(stream);
  return all;
}

void abandon(Stream& stream, Result code) {
  stream.failed = code;
  for (Work& work : stream.queue) {
    if (work.kind != Work::record) continue;
    work.event->done = std::max(work.event->done, work.ticket);
    work.event->error = code;
  }
  stream.queue.clear();
}

// Drops waits that are over and begins the new head.
static void settle(Stream& stream) {
  while (!stream.queue.empty()) {
    Work& head = stream.queue.front();
    if (head.kind == Work::wait && head.event->done >= head.ticket) {
      stream.queue.pop_front();
      continue;
    }
    if (!head.begun && head.kind == Work::effect) {
      head.begun = true;
      if (head.begin) head.begin();
    }
    return;
  }
}

bool complete(Event& event, uint64_t ticket) {
  while (event.done < ticket) {
    if (event.hung || !event.stream || !advance(event.stream)) return false;
  }
  return true;
}

bool advance(const std::shared_ptr<Stream>& stream) {
  settle(*stream);
  if (stream->queue.empty()) return false;
  Work& head = stream->queue.front();
  if (head.kind == Work::wait) {
    const std::shared_ptr<Event> event = head.event;
    if (!complete(*event, head.ticket)) return false;
    settle(*stream);
    return true;
  }
  if (head.kind == Work::record) {
    if (head.event->hung) return false;
    head.event->done = std::max(head.event->done, head.ticket);
    head.event->seconds = now_seconds();
    stream->queue.pop_front();
    settle(*stream);
    return true;
  }
  Result code;
  if (head.run) {
    code = head.run(head.running);
    if (code == SUSPENDED) return false;
    stream->queue.pop_front();
  } else {
    const Work work = std::move(head);
    stream->queue.pop_front();
    code = work.end();
  }
  if (code != SUCCESS) abandon(*stream, code);
  settle(*stream);
  return true;
}

Result enqueue(const std::shared_ptr<Stream>& stream, Work work) {
  if (stream->failed != SUCCESS) return stream->failed;
  if (stream->capture) {
    // Allowed, but in the graph for good, and never run here.
    if (stream->capture->owner != std::this_thread::get_id()) {
      state().violation(format("%s goes into another thread's capture", work.call), false);
    }
    stream->capture->work.push_back(std::move(work));
    return SUCCESS;
  }
  if (work.kind == Work::record && state().hang_at > 0 && --state().hang_at == 0) work.event->hung = true;
  stream->queue.push_back(std::move(work));
  settle(*stream);
  return SUCCESS;
}

void rest() {
  State& s = state();
  for (auto& stream : all_streams()) {
    if (stream->queue.empty() || !stream->queue.front().running) continue;
    s.changed.wait_for(s.mutex, std::chrono::microseconds(20));
    return;
  }
  s.changed.wait(s.mutex);
}

// Waits while a hung event or a launch that is suspended stands in the way;
// another thread lets it go on.
static Result drain(const std::shared_ptr<Stream>& stream) {
  while (!stream->queue.empty()) {
    if (!advance(stream) && !stream->queue.empty()) rest();
  }
  return stream->failed;
}

Result synchronise(const std::shared_ptr<Stream>& stream) {
  const Result code = drain(stream);
  return state().sticky != SUCCESS ? state().sticky : code;
}

Result synchronise_all() {
  Result first = SUCCESS;
  for (auto& stream : all_streams()) {
    const Result code = synchronise(stream);
    if (first == SUCCESS) first = code;
  }
  return first;
}

void finish_launch(const std::shared_ptr<Stream>& stream) {
  if (!state().settings.blocking || stream->capture) return;
  while (advance(stream)) {
  }
  if (stream->queue.empty() || !stream->queue.front().running) return;
  state().violation(format("%s waits for the host, whose launch has not returned", stream->queue.front().call), false);
}

void beside_spins(const std::string& what) {
  for (auto& stream : all_streams()) {
    if (stream->queue.empty() || !stream->queue.front().running) continue;
    if (advance(stream)) continue;  // it was answered meanwhile
    state().violation(format("%s while %s waits for the host", what.c_str(), stream->queue.front().call), false);
    return;
  }
}

void let_run() {
  State& s = state();
  std::erase_if(s.leaving, [](auto& stream) { return stream->queue.empty(); });
  if (s.settings.drain == Drain::lazy) return;
  auto streams = all_streams();
  if (s.settings.drain == Drain::random) {
    for (uint64_t steps = s.draw(4); steps > 0; steps--) advance(streams[s.draw(streams.size())]);
    return;
  }
  for (auto& stream : streams) {
    while (advance(stream)) {
    }
  }
}

const char* in_use(const Region& region) {
  for (auto& stream : all_streams()) {
    for (const Work& work : stream->queue) {
      for (const Region& touched : work.touches) {
        if (touched.base < region.base + region.bytes && region.base < touched.base + touched.bytes) return work.call;
      }
    }
  }
  return nullptr;
}

}  // namespace standin

using namespace standin;

API cuStreamCreateWithPriority(void** out, unsigned flags, int priority) {
  ENTER("cuStreamCreateWithPriority");
  if (!out || flags > 1) return INVALID_VALUE;
  auto stream = std::make_shared<Stream>();
  stream->flags = flags;
  stream->priority = std::clamp(priority, -5, 0);
  *out = state().streams.add(stream);
  return SUCCESS;
}

API cuStreamCreate(void** out, unsigned flags) {
  ENTER("cuStreamCreate");
  if (!out || flags > 1) return INVALID_VALUE;
  auto stream = std::make_shared<Stream>();
  stream->flags = flags;
  *out = state().streams.add(stream);
  return SUCCESS;
}

API cuStreamDestroy_v2(void* handle) {
  ENTER("cuStreamDestroy");
  auto stream = state().streams.get(handle);
  if (!stream) return INVALID_HANDLE;
  state().streams.remove(handle);
  if (!stream->queue.empty()) state().leaving.push_back(stream);  // its work goes on
  return SUCCESS;
}

API cuStreamGetPriority(void* handle, int* priority) {
  ENTER("cuStreamGetPriority");
  auto stream = stream_of(handle);
  if (!stream) return INVALID_HANDLE;
  *priority = stream->priority;
  return SUCCESS;
}

API cuStreamGetFlags(void* handle, unsigned* flags) {
  ENTER("cuStreamGetFlags");
  auto stream = stream_of(handle);
  if (!stream) return INVALID_HANDLE;
  *flags = stream->flags;
  return SUCCESS;
}

API cuStreamSynchronize(void* handle) {
  ENTER("cuStreamSynchronize");
  auto stream = stream_of(handle);
  if (!stream) return INVALID_HANDLE;
  if (stream->capture) {
    stream->capture->invalid = true;
    return CAPTURE_UNSUPPORTED;
  }
  return synchronise(stream);
}

API cuStreamQuery(void* handle) {
  ENTER("cuStreamQuery");
  auto stream = stream_of(handle);
  if (!stream) return INVALID_HANDLE;
  if (stream->capture) {
    stream->capture->invalid = true;
    return CAPTURE_UNSUPPORTED;
  }
  if (stream->failed != SUCCESS) return stream->failed;
  if (!stream->queue.empty()) advance(stream);  // one piece a question
  return stream->failed != SUCCESS ? stream->failed : stream->queue.empty() ? SUCCESS : NOT_READY;
}

API cuEventCreate(void** out, unsigned flags) {
  ENTER("cuEventCreate");
  if (!out) return INVALID_VALUE;
  auto event = std::make_shared<Event>();
  event->timing = !(flags & 2);
  *out = state().events.add(event);
  return SUCCESS;
}

API cuEventDestroy_v2(void* handle) {
  ENTER("cuEventDestroy");
  return state().events.remove(handle) ? SUCCESS : INVALID_HANDLE;
}

API cuEventRecord(void* handle, void* stream_handle) {
  ENTER("cuEventRecord");
  auto before = state().events.get(handle);
  auto stream = stream_of(stream_handle);
  if (!before || !stream) return INVALID_HANDLE;
  if (stream->failed != SUCCESS) return stream->failed;
  // Who waits for the record before goes on waiting for that one.
  auto event = std::make_shared<Event>();
  event->timing = before->timing;
  state().events.replace(handle, event);
  event->captured = stream->capture != nullptr;
  event->stream = stream;
  event->polls = 0;
  event->error = SUCCESS;
  if (event->captured) return SUCCESS;  // an edge between captured streams
  event->hung = false;
  Work work;
  work.call = "cuEventRecord";
  work.kind = Work::record;
  work.event = event;
  work.ticket = ++event->recorded;
  return enqueue(stream, std::move(work));
}

API cuEventRecordWithFlags(void* handle, void* stream, unsigned) { return cuEventRecord(handle, stream); }

API cuStreamWaitEvent(void* stream_handle, void* handle, unsigned) {
  ENTER("cuStreamWaitEvent");
  auto event = state().events.get(handle);
  auto stream = stream_of(stream_handle);
  if (!event || !stream) return INVALID_HANDLE;
  if (stream->failed != SUCCESS) return stream->failed;
  if (event->captured && event->stream) {  // this stream joins the capture
    if (event->stream->capture && !stream->capture) stream->capture = event->stream->capture;
    return SUCCESS;
  }
  if (event->done >= event->recorded) return SUCCESS;
  Work work;
  work.call = "cuStreamWaitEvent";
  work.kind = Work::wait;
  work.event = event;
  work.ticket = event->recorded;
  return enqueue(stream, std::move(work));
}

API cuEventQuery(void* handle) {
  ENTER("cuEventQuery");
  OUTSIDE_CAPTURES();
  auto event = state().events.get(handle);
  if (!event) return INVALID_HANDLE;
  // A loop of questions ends, but not at the first one.
  if (event->done < event->recorded && ++event->polls > 2) complete(*event, event->recorded);
  if (event->done < event->recorded) return NOT_READY;
  return event->error;
}

API cuEventSynchronize(void* handle) {
  ENTER("cuEventSynchronize");
  OUTSIDE_CAPTURES();
  auto event = state().events.get(handle);
  if (!event) return INVALID_HANDLE;
  const uint64_t ticket = event->recorded;
  while (!complete(*event, ticket)) rest();
  return state().sticky != SUCCESS ? state().sticky : event->error;
}

static Result elapsed(float* milliseconds, void* from_handle, void* to_handle) {
  auto from = state().events.get(from_handle), to = state().events.get(to_handle);
  if (!from || !to) return INVALID_HANDLE;
  if (!from->timing || !to->timing || from->recorded == 0 || to->recorded == 0) return INVALID_HANDLE;
  if (from->done < from->recorded || to->done < to->recorded) return NOT_READY;
  *milliseconds = float((to->seconds - from->seconds) * 1e3);
  return SUCCESS;
}

API cuEventElapsedTime(float* milliseconds, void* from, void* to) {
  ENTER("cuEventElapsedTime");
  return elapsed(milliseconds, from, to);
}

API cuEventElapsedTime_v2(float* milliseconds, void* from, void* to) {
  ENTER("cuEventElapsedTime");
  return elapsed(milliseconds, from, to);
}

API cuLaunchHostFunc(void* handle, void (*function)(void*), void* data) {
  ENTER("cuLaunchHostFunc");
  auto stream = stream_of(handle);
  if (!stream) return INVALID_HANDLE;
  if (!function) return INVALID_VALUE;
  Work work;
  work.call = "cuLaunchHostFunc";
  work.end = [=] {
    function(data);
    return SUCCESS;
  };
  return enqueue(stream, std::move(work));
}
