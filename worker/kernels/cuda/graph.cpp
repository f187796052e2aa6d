// Operators of our own in libtorch's graph, and the few switches that its C interface lacks. Uses symbols of libtorch_cpu and libc10 alone:
// what it says to a GPU goes through libtorch's own registries, so that it links where there is none.

#include <ATen/Context.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/Event.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <algorithm>
#include <cstring>
#include <exception>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <vector>

using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

namespace {

constexpr size_t MAX_PROBLEM = 512;

// Copies a text, cut to what fits, with its end.
void write(char* problem, const char* text) {
  std::strncpy(problem, text, MAX_PROBLEM - 1);
  problem[MAX_PROBLEM - 1] = 0;
}

template <class Work>
bool guarded(char* problem, Work work) {
  try {
    work();
    return true;
  } catch (const std::exception& error) {
    write(problem, error.what());
  } catch (...) {
    write(problem, "an exception without a name");
  }
  return false;
}

// Computes gradients of the inputs from those of the outputs. All tensors change hands with the call; null is an undefined one.
typedef bool (*Backward)(const void* state, at::Tensor** saved, at::Tensor** gradients, const bool* wanted, at::Tensor** results,
                         char* problem);
typedef void (*Release)(void* state);

// A step of the graph whose way back is not libtorch's.
class Step : public Node {
 public:
  Step(size_t num_inputs, void* state, Backward backward, Release release)
      : num_inputs_(num_inputs), state_(state), backward_(backward), release_(release) {}

  ~Step() override { release_(state_); }

  void save(const at::Tensor& tensor, bool is_output) { saved_.emplace_back(tensor, is_output); }

  variable_list apply(variable_list&& gradients) override {
    std::lock_guard<std::mutex> lock(mutex_);
    TORCH_CHECK(!at::GradMode::is_enabled(), "a fused operator has no second derivative");
    TORCH_CHECK(!is_released_, "a fused operator was walked back through twice");
    std::vector<at::Tensor*> saved, given;
    for (const SavedVariable& variable : saved_) saved.push_back(new at::Tensor(variable.unpack(shared_from_this())));
    for (at::Tensor& gradient : gradients) given.push_back(gradient.defined() ? new at::Tensor(gradient) : nullptr);
    // std::vector<bool> has no addresses.
    std::unique_ptr<bool[]> wanted(new bool[num_inputs_]);
    for (size_t index = 0; index < num_inputs_; ++index) wanted[index] = task_should_compute_output(index);
    std::vector<at::Tensor*> results(num_inputs_, nullptr);
    char problem[MAX_PROBLEM] = "";
    bool is_done = backward_(state_, saved.data(), given.data(), wanted.get(), results.data(), problem);
    variable_list found(num_inputs_);
    for (size_t index = 0; index < num_inputs_; ++index) {
      std::unique_ptr<at::Tensor> result(results[index]);
      if (result) found[index] = *result;
    }
    TORCH_CHECK(is_done, problem);
    return found;
  }

  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    saved_.clear();
    is_released_ = true;
  }

 private:
  size_t num_inputs_;
  void* state_;
  Backward backward_;
  Release release_;
  std::vector<SavedVariable> saved_;
  bool is_released_ = false;
};

}  // namespace

extern "C" {

// Whether the graph is to hold a step from these inputs.
bool peapod_is_recorded(const at::Tensor* const* inputs, size_t num_inputs) {
  if (!at::GradMode::is_enabled()) return false;
  return std::any_of(inputs, inputs + num_inputs, [](const at::Tensor* input) { return input->requires_grad(); });
}

// Puts a step from inputs to outputs into the graph. `saved` are inputs, outputs, or neither; the state is the step's from here on, also when
// this fails.
bool peapod_record(const at::Tensor* const* inputs, size_t num_inputs, at::Tensor* const* outputs, size_t num_outputs,
                   const at::Tensor* const* saved, size_t num_saved, void* state, Backward backward, Release release, char* problem) {
  return guarded(problem, [&] {
    std::shared_ptr<Step> step(new Step(num_inputs, state, backward, release), torch::autograd::deleteNode);
    torch::autograd::edge_list edges;
    for (size_t index = 0; index < num_inputs; ++index) edges.push_back(torch::autograd::impl::gradient_edge(*inputs[index]));
    step->set_next_edges(std::move(edges));
    for (size_t index = 0; index < num_outputs; ++index) torch::autograd::set_history(*outputs[index], step);
    for (size_t index = 0; index < num_saved; ++index) {
      bool is_output = std::any_of(outputs, outputs + num_outputs, [&](at::Tensor* output) { return output->is_same(*saved[index]); });
      step->save(*saved[index], is_output);
    }
  });
}

// The stream that libtorch works on at the moment, as the driver calls it; null is the device's first one.
bool peapod_current_stream(int device, void** stream, char* problem) {
  return guarded(problem, [&] {
    c10::impl::VirtualGuardImpl guard(c10::DeviceType::CUDA);
    *stream = guard.getStreamNativeHandle(guard.getStream(c10::Device(c10::DeviceType::CUDA, static_cast<c10::DeviceIndex>(device))));
  });
}

// A stream of libtorch's pool, which waits for what the current one has been given so far.
bool peapod_open_stream(int device, int64_t* id, char* problem) {
  return guarded(problem, [&] {
    c10::Device gpu(c10::DeviceType::CUDA, static_cast<c10::DeviceIndex>(device));
    c10::impl::VirtualGuardImpl guard(c10::DeviceType::CUDA);
    c10::Stream stream = guard.getStreamFromGlobalPool(gpu);
    c10::Event event(c10::DeviceType::CUDA);
    event.record(guard.getStream(gpu));
    event.block(stream);
    *id = stream.id();
  });
}

// Makes a stream the one that this thread's work goes to, and says which it was before.
bool peapod_exchange_stream(int device, int64_t id, int64_t* before, char* problem) {
  return guarded(problem, [&] {
    c10::Device gpu(c10::DeviceType::CUDA, static_cast<c10::DeviceIndex>(device));
    *before = c10::impl::VirtualGuardImpl(c10::DeviceType::CUDA).exchangeStream(c10::Stream(c10::Stream::UNSAFE, gpu, id)).id();
  });
}

// Has the current stream wait for what another was given so far, and keeps the memory of tensors that were made there until the current one,
// too, is done with them.
bool peapod_join_stream(int device, int64_t id, const at::Tensor* const* tensors, size_t num_tensors, char* problem) {
  return guarded(problem, [&] {
    c10::Device gpu(c10::DeviceType::CUDA, static_cast<c10::DeviceIndex>(device));
    c10::Stream current = c10::impl::VirtualGuardImpl(c10::DeviceType::CUDA).getStream(gpu);
    c10::Event event(c10::DeviceType::CUDA);
    event.record(c10::Stream(c10::Stream::UNSAFE, gpu, id));
    event.block(current);
    for (size_t index = 0; index < num_tensors; ++index) {
      if (tensors[index]->is_cuda()) tensors[index]->record_stream(current);
    }
  });
}

// A copy on pages that a GPU reads by itself. (libtorch's C interface names a device, which is deprecated and warned of each time.)
bool peapod_pin(const at::Tensor* tensor, at::Tensor** pinned, char* problem) {
  return guarded(problem, [&] { *pinned = new at::Tensor(tensor->pin_memory()); });
}

// Gives memory that no tensor uses back to the GPU, for others to have.
bool peapod_release_unused_memory(char* problem) {
  return guarded(problem, [&] { c10::getDeviceAllocator(c10::DeviceType::CUDA)->emptyCache(); });
}

// Whether f32 convolutions and products may round what they multiply to ten bits.
bool peapod_allow_tf32(bool convolutions, bool products, char* problem) {
  return guarded(problem, [&] {
    at::globalContext().setAllowTF32CuDNN(convolutions);
    at::globalContext().setAllowTF32CuBLAS(products);
  });
}

// Which implementation of attention is tried first, as at::SDPBackend numbers them; the others follow in libtorch's order.
bool peapod_prefer_attention(int64_t backend, char* problem) {
  return guarded(problem, [&] {
    std::vector<int64_t> order = {backend};
    for (at::SDPBackend other : at::globalContext().sDPPriorityOrder()) {
      if (static_cast<int64_t>(other) != backend) order.push_back(static_cast<int64_t>(other));
    }
    at::globalContext().setSDPPriorityOrder(order);
  });
}

// Which implementation of attention is tried first at the moment.
int64_t peapod_preferred_attention() { return static_cast<int64_t>(at::globalContext().sDPPriorityOrder()[0]); }
}
