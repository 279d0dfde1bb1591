//! The runtime on a real GPU. Without one, each test says so and passes; with
//! `FLEX_BLOCK_ATTN_REQUIRE_GPU=1` it fails.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use flex_block_attn_cuda::{Buffer, Device, Error, Stream, devices};
use flex_block_attn_ptx::builder::{TmaOptions, Value};
use flex_block_attn_ptx::ir::Fence;
use flex_block_attn_ptx::{Arg, Builder, Element, Kernel, Launch, Swizzle, TensorMap};

/// The GPU that tests run on, if there is one.
fn gpu() -> Option<&'static Device> {
    let found = Device::get(0).and_then(|device| device.check().map(|()| device));
    match found {
        Ok(device) => Some(device),
        Err(error) if std::env::var_os("FLEX_BLOCK_ATTN_REQUIRE_GPU").is_some() => {
            panic!("{error}")
        }
        Err(error) => {
            // Past the capture of output: a skipped test says why.
            let _ = writeln!(std::io::stderr(), "skipped: {error}");
            None
        }
    }
}

const COUNT: usize = 10_000;

/// `y[i] += a x[i]`.
fn axpy(name: &str) -> Kernel {
    Builder::kernel(name, 128, |k| {
        let (x, y) = (k.param::<u64>("x"), k.param::<u64>("y"));
        let (a, n) = (k.param::<f32>("a"), k.param::<u32>("n"));
        let i = k.cta_x() * 128 + k.tid();
        k.if_(i.lt(n), || {
            let (x, y) = (x + i.times_wide(4), y + i.times_wide(4));
            let sum = k
                .load_global::<f32>(x.at(0))
                .fma(a, k.load_global::<f32>(y.at(0)));
            k.store_global(y.at(0), sum);
        });
    })
}

fn axpy_launch(x: &Buffer, y: &Buffer) -> Launch {
    Launch {
        grid: [COUNT.div_ceil(128) as u32, 1, 1],
        args: vec![
            Arg::U64(x.address()),
            Arg::U64(y.address()),
            Arg::F32(2.0),
            Arg::U32(COUNT as u32),
        ],
    }
}

fn floats(device: &'static Device, value: impl Fn(usize) -> f32) -> Buffer {
    let buffer = device.alloc(4 * COUNT).expect("memory");
    let bytes: Vec<u8> = (0..COUNT).flat_map(|i| value(i).to_le_bytes()).collect();
    buffer.write(&bytes).expect("a copy");
    buffer
}

fn read(buffer: &Buffer) -> Vec<f32> {
    let mut bytes = vec![0; 4 * COUNT];
    buffer.read(&mut bytes).expect("a copy");
    let words = bytes.chunks_exact(4);
    words
        .map(|word| f32::from_le_bytes(word.try_into().expect("4 bytes")))
        .collect()
}

#[test]
fn kernels_run() {
    let Some(device) = gpu() else { return };
    let function = device.load(&axpy("axpy")).expect("loaded");
    let (x, y) = (floats(device, |i| i as f32), floats(device, |_| 1.0));
    // SAFETY: x and y hold COUNT floats.
    unsafe { function.launch(&axpy_launch(&x, &y), Stream::DEFAULT) }.expect("launched");
    let right = |(i, y): (usize, &f32)| *y == 1.0 + 2.0 * i as f32;
    assert!(read(&y).iter().enumerate().all(right));
}

#[test]
fn many_threads_share_a_kernel() {
    let Some(device) = gpu() else { return };
    std::thread::scope(|scope| {
        for thread in 0..8 {
            scope.spawn(move || {
                let function = device.load(&axpy("axpy_shared")).expect("loaded");
                let (x, y) = (floats(device, |_| thread as f32), floats(device, |_| 0.0));
                for _ in 0..100 {
                    // SAFETY: x and y hold COUNT floats.
                    unsafe { function.launch(&axpy_launch(&x, &y), Stream::DEFAULT) }
                        .expect("launched");
                }
                assert!(read(&y).iter().all(|&y| y == 200.0 * thread as f32));
            });
        }
    });
    let load = || device.load(&axpy("axpy_shared")).expect("loaded");
    assert!(std::ptr::eq(load(), load()), "loaded twice");
}

/// Copies a box of a 2-D tensor to another, by TMA, in clusters of two.
fn copy_kernel() -> Kernel {
    Builder::kernel("copy_tiles", 32, |k| {
        let (from, to) = (k.tensor_map("from"), k.tensor_map("to"));
        k.set_cluster(2);
        k.set_shared_bytes(8 * 128 + 8);
        let tile = k.shared_base();
        let barrier = tile.at(8 * 128);
        let row = k.cta_x() * 8;
        let at = [0u32.operand(), row.operand()];
        k.if_(k.tid().equals(0), || {
            k.mbarrier_init(barrier, 1);
            k.mbarrier_init_fence();
            k.mbarrier_arrive_expect(barrier, 8 * 128);
            k.tma_load(tile.at(0), from, &at, barrier, TmaOptions::default());
            k.mbarrier_wait(barrier, 0);
            k.fence(Fence::ProxyAsyncShared);
            k.tma_store(to, &at, tile.at(0));
            k.bulk_commit();
            k.bulk_wait(0);
        });
        k.cluster_sync();
    })
}

#[test]
fn tensor_maps_and_clusters() {
    let Some(device) = gpu() else { return };
    let function = device.load(&copy_kernel()).expect("loaded");
    let (from, to) = (floats(device, |i| i as f32), floats(device, |_| -1.0));
    let map = |buffer: &Buffer| {
        Arg::TensorMap(TensorMap {
            element: Element::F32,
            address: buffer.address(),
            rank: 2,
            // Ten rows of 32: the second tile is cut.
            dims: [32, 10, 0, 0, 0],
            strides: [4, 128, 0, 0, 0],
            tile: [32, 8, 0, 0, 0],
            swizzle: Swizzle::B128,
        })
    };
    let launch = Launch {
        grid: [2, 1, 1],
        args: vec![map(&from), map(&to)],
    };
    // SAFETY: both hold more than 10 rows.
    unsafe { function.launch(&launch, Stream::DEFAULT) }.expect("launched");
    for (i, value) in read(&to).into_iter().enumerate() {
        assert_eq!(value, if i < 320 { i as f32 } else { -1.0 });
    }
}

#[test]
fn wrong_launches_and_kernels_are_named() {
    let Some(device) = gpu() else { return };
    let function = device.load(&axpy("axpy_wrong")).expect("loaded");
    let launch = Launch {
        grid: [1, 1, 1],
        args: vec![Arg::U32(1)],
    };
    // SAFETY: it is refused.
    let error = unsafe { function.launch(&launch, Stream::DEFAULT) }.expect_err("refused");
    assert!(
        error.to_string().contains("1 arguments for 4 parameters"),
        "{error}"
    );

    // Shared memory beyond what a thread block can have.
    let mut kernel = axpy("axpy_large");
    kernel.shared_bytes = 300 << 10;
    let error = device.load(&kernel).expect_err("refused");
    assert!(error.to_string().contains("cuFuncSetAttribute"), "{error}");

    let mut kernel = axpy("axpy_bad");
    kernel.params[0].name = "bad name".to_owned();
    kernel.name = "not an identifier".to_owned();
    let Err(Error::Compile { log, .. }) = device.load(&kernel) else {
        panic!("compiled");
    };
    assert!(!log.is_empty());
    let absent = Device::get(99).expect_err("no such GPU");
    assert!(absent.to_string().contains("cuDeviceGet"), "{absent}");
}

/// Run by the test below in processes of its own.
#[test]
#[ignore = "a part of another test"]
fn a_process_loads_a_kernel() {
    let device = Device::get(0).expect("a GPU");
    device.load(&axpy("axpy_kept")).expect("loaded");
}

/// The driver does as we rely on: it keeps compiled code, and survives damage to it.
#[test]
fn compiled_code_is_kept_between_processes() {
    if gpu().is_none() {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let load = || {
        let output = Command::new(std::env::current_exe().expect("a path"))
            .args(["a_process_loads_a_kernel", "--exact", "--ignored"])
            .env("CUDA_CACHE_PATH", folder.path())
            .env_remove("CUDA_CACHE_DISABLE")
            .output()
            .expect("it runs");
        assert!(output.status.success(), "{output:?}");
        let mut files = Vec::new();
        walk(folder.path(), &mut files);
        files.sort();
        files
    };
    let files = load();
    assert!(!files.is_empty(), "nothing was kept");
    assert_eq!(load(), files, "compiled again");
    for file in files {
        let whole = std::fs::read(&file).expect("readable");
        std::fs::write(&file, &whole[..whole.len() / 2]).expect("writable");
    }
    load();
}

fn walk(folder: &Path, files: &mut Vec<PathBuf>) {
    for entry in folder.read_dir().expect("readable") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            walk(&path, files);
        } else {
            files.push(path);
        }
    }
}

/// Without `setmaxnreg` obeyed, 200 registers in a block of 384 threads would not fit.
#[test]
fn registers_move_between_warpgroups() {
    let Some(device) = gpu() else { return };
    let kernel = Builder::kernel("many_registers", 384, |k| {
        let data = k.param::<u64>("data");
        let consumer = (k.tid() >> 7).uniform().gt(0);
        k.if_else(
            consumer,
            || {
                k.set_max_registers(true, 240);
                let own = data + k.tid().times_wide(4);
                let values: Vec<_> = (0..200)
                    .map(|i| k.load_global::<f32>(own.at(4 * 384 * i)))
                    .collect();
                // All are alive here.
                k.sync_threads();
                for (i, value) in values.into_iter().enumerate() {
                    k.store_global(own.at(4 * 384 * (199 - i as u32)), value);
                }
            },
            || {
                k.set_max_registers(false, 24);
                k.sync_threads();
            },
        );
    });
    let function = device.load(&kernel).expect("loaded");
    assert_eq!(function.spilled_bytes().expect("known"), 0);
    assert!(function.registers().expect("known") <= 168);
}

#[test]
fn events_measure() {
    let Some(device) = gpu() else { return };
    let function = device.load(&axpy("axpy_timed")).expect("loaded");
    let (x, y) = (floats(device, |_| 0.0), floats(device, |_| 0.0));
    let (start, end) = (
        device.event().expect("an event"),
        device.event().expect("an event"),
    );
    // SAFETY: x and y hold COUNT floats.
    unsafe {
        start.record(Stream::DEFAULT).expect("recorded");
        for _ in 0..100 {
            function
                .launch(&axpy_launch(&x, &y), Stream::DEFAULT)
                .expect("launched");
        }
        end.record(Stream::DEFAULT).expect("recorded");
    }
    let ms = end.elapsed_ms(&start).expect("measured");
    assert!(ms > 0.0 && ms < 1000.0, "{ms} ms");
}

#[test]
fn devices_are_listed() {
    let Some(device) = gpu() else {
        let error = devices().err().map(|error| error.to_string());
        assert!(error.is_none_or(|text| text.starts_with("no CUDA device: ")));
        return;
    };
    let all = devices().expect("there is one");
    assert!(std::ptr::eq(all[0], device));
    assert!(device.memory_bytes() > 1 << 30 && device.multiprocessors() > 1);
    assert!(device.driver_version() >= (12, 0));
}

#[test]
fn words_are_written_though_they_go() {
    let Some(device) = gpu() else { return };
    let expected: Vec<u8> = (0..1u64 << 16).flat_map(u64::to_ne_bytes).collect();
    let buffer = device.alloc(expected.len()).expect("memory");
    let mut words: Vec<u64> = (0..1 << 16).collect();
    // SAFETY: the buffer has as many bytes, and the default stream is not captured.
    unsafe { device.write_words(buffer.address(), &words, Stream::DEFAULT) }.expect("a copy");
    words.fill(0);
    let mut found = vec![0; expected.len()];
    buffer.read(&mut found).expect("a copy");
    assert_eq!(found, expected);
}
