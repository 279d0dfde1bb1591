//! [`Gpu`]: a GPU for tests and measurements, with memory of its own.
//!
//! In: kernels, launches and bytes. Out: what the kernels left, and times. The one place of this
//! crate that launches.

#![allow(unsafe_code)]

use std::io::Write as _;
use std::ops::Range;

use flex_block_attn_cuda::{Buffer, Device, Error, Function, Stream};
use flex_block_attn_emulator::Memory;
use flex_block_attn_ptx::{Arg, Kernel, Launch};

/// A GPU, and memory that is freed with this.
#[derive(Debug)]
pub struct Gpu {
    device: &'static Device,
    buffers: Vec<(Range<u64>, Buffer)>,
}

/// Milliseconds of one call.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Times {
    /// The median.
    pub median: f32,
    /// The shortest.
    pub min: f32,
    /// The longest.
    pub max: f32,
}

impl Gpu {
    /// The first GPU, if it can run our kernels.
    ///
    /// # Errors
    /// Why there is none.
    pub fn find() -> Result<Self, Error> {
        let device = Device::get(0)?;
        device.check()?;
        Ok(Self {
            device,
            buffers: Vec::new(),
        })
    }

    /// The first GPU, for tests: without one, says why on standard error and gives none.
    ///
    /// # Panics
    /// If there is none, and `FLEX_BLOCK_ATTN_REQUIRE_GPU` is set.
    pub fn for_test() -> Option<Self> {
        match Self::find() {
            Ok(gpu) => Some(gpu),
            Err(error) if std::env::var_os("FLEX_BLOCK_ATTN_REQUIRE_GPU").is_some() => {
                panic!("{error}")
            }
            Err(error) => {
                // Past the capture of output: what is skipped says why.
                let _ = writeln!(std::io::stderr(), "not run on a GPU: {error}");
                None
            }
        }
    }

    /// The device.
    pub fn device(&self) -> &'static Device {
        self.device
    }

    /// Allocates bytes, and gives their address. They hold 0xff: NaN, were they read as numbers.
    ///
    /// # Errors
    /// What the driver says.
    pub fn alloc(&mut self, bytes: usize) -> Result<u64, Error> {
        let buffer = self.device.alloc(bytes)?;
        buffer.fill(0xff)?;
        let address = buffer.address();
        self.buffers.push((address..address + bytes as u64, buffer));
        Ok(address)
    }

    /// Allocates as many bytes as there are, and writes them.
    ///
    /// # Errors
    /// What the driver says.
    pub fn alloc_with(&mut self, bytes: &[u8]) -> Result<u64, Error> {
        let buffer = self.device.alloc(bytes.len())?;
        buffer.write(bytes)?;
        let address = buffer.address();
        let range = address..address + bytes.len() as u64;
        self.buffers.push((range, buffer));
        Ok(address)
    }

    /// Reads an allocation from its start.
    ///
    /// # Errors
    /// What the driver says, faults of kernels included.
    ///
    /// # Panics
    /// If there is none at the address.
    pub fn read(&self, address: u64, bytes: usize) -> Result<Vec<u8>, Error> {
        let found = self
            .buffers
            .iter()
            .find(|(range, _)| range.start == address);
        let (_, buffer) = found.expect("an allocation starts there");
        let mut to = vec![0; bytes];
        buffer.read(&mut to)?;
        Ok(to)
    }

    /// A kernel on this device.
    ///
    /// # Errors
    /// What the driver says.
    pub fn load(&self, kernel: &Kernel) -> Result<&'static Function, Error> {
        self.device.load(kernel)
    }

    /// Launches on the default stream.
    ///
    /// # Errors
    /// What the driver says.
    ///
    /// # Panics
    /// If a tensor map's address is not in memory of this.
    pub fn launch(&self, function: &Function, launch: &Launch) -> Result<(), Error> {
        for arg in &launch.args {
            if let Arg::TensorMap(map) = arg {
                let inside = |(range, _): &(Range<u64>, Buffer)| range.contains(&map.address);
                assert!(
                    self.buffers.iter().any(inside),
                    "{map:?} is not in our memory"
                );
            }
        }
        // SAFETY: memory lives as long as `self`, whose buffers wait for the device when they are
        // freed; kernels stay within what their documentation says, as the emulator has shown, and
        // callers are tests and measurements, which give them as much.
        unsafe { function.launch(launch, Stream::DEFAULT) }
    }

    /// Has 32-bit words set to 0 on the default stream.
    ///
    /// # Errors
    /// What the driver says.
    ///
    /// # Panics
    /// If they are not in memory of this.
    pub fn zero_words(&self, address: u64, words: usize) -> Result<(), Error> {
        let end = address + 4 * words as u64;
        let inside =
            |(range, _): &(Range<u64>, Buffer)| range.contains(&address) && end <= range.end;
        assert!(
            self.buffers.iter().any(inside),
            "{address:#x} is not in our memory"
        );
        // SAFETY: the memory is this one's, and the default stream is always there.
        unsafe { self.device.zero_words(address, words, Stream::DEFAULT) }
    }

    /// Runs kernels one after the other as the emulator would, on a copy of its memory, which gets the
    /// results. The copy is at other addresses: those in the launches are moved there. Bytes that
    /// were never written are 0xff before (NaN, were they read as numbers), and count as written
    /// after.
    ///
    /// # Errors
    /// What the driver says, faults of the kernels included.
    pub fn run<'a>(
        &self,
        steps: impl IntoIterator<Item = (&'a Kernel, &'a Launch)>,
        memory: &mut Memory,
    ) -> Result<(), Error> {
        let mut copies = Vec::new();
        for allocation in memory.allocations() {
            let pairs = allocation.bytes().iter().zip(allocation.written());
            let bytes: Vec<u8> = pairs
                .map(|(&x, known)| if known { x } else { 0xff })
                .collect();
            let buffer = self.device.alloc(bytes.len())?;
            buffer.write(&bytes)?;
            copies.push((allocation.range(), buffer));
        }
        let places: Vec<u64> = copies.iter().map(|(_, copy)| copy.address()).collect();
        for (kernel, launch) in steps {
            let function = self.load(kernel)?;
            let launch = relocated(launch, memory, &places);
            // SAFETY: the copies live until they are read below, which waits for the launch; the
            // kernel stays within them, as the emulator shows of each that tests run.
            unsafe { function.launch(&launch, Stream::DEFAULT)? };
        }
        for (range, copy) in copies {
            let mut bytes = vec![0; (range.end - range.start) as usize];
            copy.read(&mut bytes)?;
            memory.write(range.start, &bytes);
        }
        Ok(())
    }

    /// Times `work`, which launches: `calls` in a row between two events, `repeats` times, after
    /// two rounds that are not counted.
    ///
    /// # Errors
    /// What the driver says.
    ///
    /// # Panics
    /// If there are no repeats.
    pub fn time(
        &self,
        calls: usize,
        repeats: usize,
        mut work: impl FnMut() -> Result<(), Error>,
    ) -> Result<Times, Error> {
        let mut times = Vec::new();
        for round in 0..repeats + 2 {
            let (start, end) = (self.device.event()?, self.device.event()?);
            // SAFETY: the default stream is always there.
            unsafe { start.record(Stream::DEFAULT)? };
            for _ in 0..calls {
                work()?;
            }
            // SAFETY: as above.
            unsafe { end.record(Stream::DEFAULT)? };
            let ms = end.elapsed_ms(&start)? / calls as f32;
            if round >= 2 {
                times.push(ms);
            }
        }
        times.sort_by(f32::total_cmp);
        Ok(Times {
            median: times[times.len() / 2],
            min: times[0],
            max: times[times.len() - 1],
        })
    }
}

/// A launch with all addresses that lie in an allocation of `memory` moved: the first allocation
/// starts at the first of `places`, and so on.
pub(crate) fn relocated(launch: &Launch, memory: &Memory, places: &[u64]) -> Launch {
    let moved = |address: u64| {
        let mut both = memory.allocations().iter().zip(places);
        let found = both.find(|(allocation, _)| allocation.range().contains(&address));
        found.map_or(address, |(allocation, place)| {
            place + (address - allocation.range().start)
        })
    };
    let mut launch = launch.clone();
    for arg in &mut launch.args {
        match arg {
            Arg::U64(address) => *address = moved(*address),
            Arg::TensorMap(map) => map.address = moved(map.address),
            Arg::U32(_) | Arg::F32(_) => {}
        }
    }
    launch
}
