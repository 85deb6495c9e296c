// The fibers of a thread block, and who waits for whom.
#include <stdio.h>
#include <stdlib.h>
#include <ucontext.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <random>
#include <vector>

#include "cuda_runtime.h"

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace {

constexpr size_t kStack = 256 << 10;
constexpr int kLanes = 32;

enum class State { kRuns, kAtBlock, kAtWarp, kDone };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  State state;
};

struct Warp {
  // Two rooms: nobody writes to one before everybody has read what was shown in it.
  alignas(16) unsigned char shown[2][kLanes][emulation::kMostBytes];
  int turn[kLanes];
};

std::mutex one_launch;
std::vector<Fiber> fibers;
std::vector<Warp> warps;
ucontext_t scheduler;
const std::function<void()>* body;
size_t current;
std::mt19937 order;

void fail(const char* what) {
  fprintf(stderr, "emulated CUDA: %s\n", what);
  abort();
}

void run_fiber() {
  (*body)();
  fibers[current].state = State::kDone;
  swapcontext(&fibers[current].context, &scheduler);
}

void prepare(Fiber& fiber) {
  fiber.state = State::kRuns;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStack;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, run_fiber, 0);
}

void wait(State state) {
  const size_t self = current;
  fibers[self].state = state;
  swapcontext(&fibers[self].context, &scheduler);
  current = self;
  threadIdx = dim3(unsigned(self));
}

bool all_are(size_t from, size_t to, State state) {
  return std::all_of(fibers.begin() + long(from), fibers.begin() + long(to),
                     [state](const Fiber& f) { return f.state == state; });
}

void release(size_t from, size_t to) {
  for (size_t i = from; i < to; ++i) fibers[i].state = State::kRuns;
}

void run_block(size_t threads) {
  for (size_t i = 0; i < threads; ++i) prepare(fibers[i]);
  for (Warp& warp : warps) std::fill(warp.turn, warp.turn + kLanes, 0);
  std::vector<size_t> turns(threads);
  for (size_t i = 0; i < threads; ++i) turns[i] = i;
  while (!all_are(0, threads, State::kDone)) {
    std::shuffle(turns.begin(), turns.end(), order);
    bool moved = false;
    for (const size_t i : turns) {
      if (fibers[i].state != State::kRuns) continue;
      moved = true;
      current = i;
      threadIdx = dim3(unsigned(i));
      swapcontext(&scheduler, &fibers[i].context);
    }
    if (all_are(0, threads, State::kAtBlock)) {
      release(0, threads);
      moved = true;
    }
    for (size_t first = 0; first < threads; first += kLanes) {
      if (!all_are(first, first + kLanes, State::kAtWarp)) continue;
      release(first, first + kLanes);
      moved = true;
    }
    if (!moved) fail("a barrier that not all threads reach");
  }
}

}  // namespace

void emulation::launch(dim3 grid, dim3 block, const std::function<void()>& kernel) {
  const std::lock_guard<std::mutex> lock(one_launch);
  const size_t threads = block.x;
  if (threads == 0 || threads % kLanes || threads > 1024 || block.y != 1 || block.z != 1) {
    fail("a thread block is not of whole warps in one dimension");
  }
  if (grid.x == 0 || grid.y == 0 || grid.y > 65535 || grid.z != 1) fail("a grid of no such size");
  if (fibers.size() < threads) fibers = std::vector<Fiber>(threads);
  warps.resize(threads / kLanes);
  body = &kernel;
  gridDim = grid;
  blockDim = block;
  order.seed(std::random_device()());
  for (unsigned y = 0; y < grid.y; ++y) {
    for (unsigned x = 0; x < grid.x; ++x) {
      blockIdx = dim3(x, y);
      run_block(threads);
    }
  }
}

void emulation::wait_for_block() { wait(State::kAtBlock); }

const unsigned char* emulation::exchange(const void* mine, size_t bytes) {
  if (bytes > kMostBytes) fail("too much shown at once");
  const size_t lane = current % kLanes;
  Warp& warp = warps[current / kLanes];
  auto& room = warp.shown[warp.turn[lane]++ % 2];
  memcpy(room[lane], mine, bytes);
  wait(State::kAtWarp);
  return &room[0][0];
}
