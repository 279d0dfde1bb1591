//! [`Device`]: a GPU, its primary context, and the kernels loaded on it.

use std::collections::HashMap;
use std::ffi::{CString, c_int};
use std::fmt;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use flex_block_attn_ptx::{Kernel, Module, print};

use crate::compile;
use crate::driver::{self, Context, DeviceHandle, Driver, FunctionHandle, Stream};
use crate::{Error, Function};

/// What our kernels are compiled for: sm_90a runs on nothing else.
const CAPABILITY: (u32, u32) = (9, 0);

/// A GPU. There is one value for each, for as long as the process lives.
pub struct Device {
    pub(crate) driver: &'static Driver,
    ordinal: u32,
    name: String,
    capability: (u32, u32),
    multiprocessors: u32,
    memory_bytes: usize,
    driver_version: (u32, u32),
    handle: DeviceHandle,
    /// The primary context: retained when it is first needed, since it takes memory.
    context: OnceLock<Context>,
    /// By PTX. Each has a lock of its own, so that compiling one keeps nobody from another.
    functions: Mutex<HashMap<String, Arc<LoadedOnce>>>,
}

type LoadedOnce = Mutex<Option<&'static Function>>;

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Device({}, {})", self.ordinal, self.name)
    }
}

/// All GPUs of the machine, of whatever kind.
///
/// # Errors
/// [`Error::Unavailable`] if there is no driver or no GPU.
pub fn devices() -> Result<Vec<&'static Device>, Error> {
    let driver = Driver::get()?;
    let mut count = 0;
    // SAFETY: the result goes to a variable of its type.
    unsafe { driver.device_count(&raw mut count)? };
    if count == 0 {
        let reason = "the NVIDIA driver sees no GPU (see CUDA_VISIBLE_DEVICES)".to_owned();
        return Err(Error::Unavailable { reason });
    }
    (0..count as u32).map(Device::get).collect()
}

impl Device {
    /// The GPU with an ordinal, as torch counts them.
    ///
    /// # Errors
    /// [`Error::Unavailable`] if there is no driver; [`Error::Call`] if there is no such GPU.
    pub fn get(ordinal: u32) -> Result<&'static Self, Error> {
        static DEVICES: Mutex<Vec<&'static Device>> = Mutex::new(Vec::new());
        let mut devices = DEVICES.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(device) = devices.iter().find(|device| device.ordinal == ordinal) {
            return Ok(device);
        }
        // Kernels point to their device, and live as long as the process.
        let device: &'static Self = Box::leak(Box::new(Self::open(Driver::get()?, ordinal)?));
        devices.push(device);
        Ok(device)
    }

    fn open(driver: &'static Driver, ordinal: u32) -> Result<Self, Error> {
        let mut handle: DeviceHandle = 0;
        let (mut version, mut memory_bytes) = (0, 0);
        let mut name = [0u8; 256];
        // SAFETY: results go to variables of their types; `name` has the length given.
        unsafe {
            driver.device_get(&raw mut handle, ordinal as c_int)?;
            driver.device_name(name.as_mut_ptr().cast(), name.len() as c_int, handle)?;
            driver.device_memory(&raw mut memory_bytes, handle)?;
            driver.version(&raw mut version)?;
        }
        let attribute = |which| {
            let mut value = 0;
            // SAFETY: the result goes to a variable of its type.
            unsafe { driver.device_attribute(&raw mut value, which, handle)? };
            Ok::<_, Error>(value as u32)
        };
        let end = name
            .iter()
            .position(|&byte| byte == 0)
            .unwrap_or(name.len());
        Ok(Self {
            driver,
            ordinal,
            name: String::from_utf8_lossy(&name[..end]).into_owned(),
            capability: (
                attribute(driver::DEVICE_MAJOR)?,
                attribute(driver::DEVICE_MINOR)?,
            ),
            multiprocessors: attribute(driver::DEVICE_MULTIPROCESSORS)?,
            memory_bytes,
            driver_version: (version as u32 / 1000, version as u32 % 1000 / 10),
            handle,
            context: OnceLock::new(),
            functions: Mutex::default(),
        })
    }

    /// Its place among the machine's.
    pub fn ordinal(&self) -> u32 {
        self.ordinal
    }

    /// As its maker calls it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its compute capability.
    pub fn capability(&self) -> (u32, u32) {
        self.capability
    }

    /// Its multiprocessors.
    pub fn multiprocessors(&self) -> u32 {
        self.multiprocessors
    }

    /// Bytes of its memory.
    pub fn memory_bytes(&self) -> usize {
        self.memory_bytes
    }

    /// The CUDA version up to which the driver goes.
    pub fn driver_version(&self) -> (u32, u32) {
        self.driver_version
    }

    /// Whether it can run our kernels.
    ///
    /// # Errors
    /// [`Error::Unavailable`] if it is no Hopper GPU.
    pub fn check(&self) -> Result<(), Error> {
        if self.capability == CAPABILITY {
            return Ok(());
        }
        let (name, (major, minor)) = (&self.name, self.capability);
        let reason = format!(
            "{name} has compute capability {major}.{minor}; our kernels are for 9.0 (H100, H200, \
             H800, GH200)"
        );
        Err(Error::Unavailable { reason })
    }

    /// A kernel on this device: loaded before, found compiled in the driver's cache on disk, or
    /// compiled now, which takes up to seconds. Looking it up costs as much as printing it: who
    /// launches often keeps it.
    ///
    /// # Errors
    /// [`Error::Unavailable`] if the device cannot run it; whatever the driver says else.
    pub fn load(&'static self, kernel: &Kernel) -> Result<&'static Function, Error> {
        self.check()?;
        let kernels = vec![kernel.clone()];
        let ptx = print(&Module { kernels });
        let slot = {
            let mut functions = self
                .functions
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            Arc::clone(functions.entry(ptx.clone()).or_default())
        };
        let mut function = slot.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(function) = *function {
            return Ok(function);
        }
        let handle = self.with_context(|| self.load_code(kernel, &ptx))?;
        let loaded: &'static Function =
            Box::leak(Box::new(Function::new(self, handle, kernel.entry())));
        *function = Some(loaded);
        Ok(loaded)
    }

    /// Loads a kernel in the current context, ready for launch.
    fn load_code(&self, kernel: &Kernel, ptx: &str) -> Result<FunctionHandle, Error> {
        let module = compile::load(self.driver, &kernel.name, ptx)?;
        let mut function = FunctionHandle::NULL;
        let name = CString::new(kernel.name.as_str()).expect("a name without 0 was compiled");
        // SAFETY: the name ends in 0, and the module is unloaded only if nobody gets its function.
        unsafe {
            let ready = (|| {
                self.driver
                    .module_function(&raw mut function, module, name.as_ptr())?;
                let shared = kernel.shared_bytes as c_int;
                self.driver
                    .function_set(function, driver::FUNCTION_SHARED_BYTES, shared)?;
                self.driver.load_now(function)
            })();
            if ready.is_err() {
                self.driver.module_unload(module)?;
            }
            ready.map(|()| function)
        }
    }

    /// Puts the filling of 32-bit words with zeros on a stream, and returns at once. It may be
    /// captured into a graph.
    ///
    /// # Errors
    /// What the driver says.
    ///
    /// # Safety
    /// The words are of this device's memory, at a multiple of 4, and nobody else's until the
    /// stream has come past this; the stream is one of this device, alive.
    pub unsafe fn zero_words(
        &self,
        address: u64,
        words: usize,
        stream: Stream,
    ) -> Result<(), Error> {
        // SAFETY: by the caller's word.
        let fill = || unsafe { self.driver.fill_words(address, 0, words, stream) };
        self.with_context(fill)
    }

    /// Puts the writing of words into device memory on a stream. The words may be changed, or gone, once
    /// this returns: they are not to be pinned memory. It must not be captured into a graph, which would
    /// read them again.
    ///
    /// # Errors
    /// What the driver says.
    ///
    /// # Safety
    /// There is as much of this device's memory at the address, and it is nobody else's until the
    /// stream has come past this; the stream is one of this device, alive, and is not captured.
    pub unsafe fn write_words(
        &self,
        address: u64,
        words: &[u64],
        stream: Stream,
    ) -> Result<(), Error> {
        let bytes = size_of_val(words);
        // SAFETY: the words are a slice; the rest is the caller's word.
        self.with_context(|| unsafe {
            self.driver
                .copy_in_later(address, words.as_ptr().cast(), bytes, stream)
        })
    }

    /// A number that no other stream of this process has, or had, or will have; none while the stream is
    /// captured into a graph, whose work other streams may do.
    ///
    /// # Errors
    /// What the driver says.
    ///
    /// # Safety
    /// The stream is one of this device, alive.
    pub unsafe fn identity(&self, stream: Stream) -> Result<Option<u64>, Error> {
        let (mut id, mut capturing) = (0, 0);
        // SAFETY: results go to variables of their types; the stream is the caller's word.
        self.with_context(|| unsafe {
            self.driver.stream_capturing(stream, &raw mut capturing)?;
            if capturing != 0 {
                return Ok(None);
            }
            self.driver.stream_id(stream, &raw mut id)?;
            Ok(Some(id))
        })
    }

    /// Waits until all that a stream was given is done.
    ///
    /// # Errors
    /// What went wrong on it, now or before.
    ///
    /// # Safety
    /// The stream is one of this device, alive.
    pub unsafe fn wait(&self, stream: Stream) -> Result<(), Error> {
        // SAFETY: by the caller's word.
        self.with_context(|| unsafe { self.driver.stream_wait(stream) })
    }

    /// Does something with this device's context current, as it mostly is already.
    pub(crate) fn with_context<T>(
        &self,
        work: impl FnOnce() -> Result<T, Error>,
    ) -> Result<T, Error> {
        let context = self.context()?;
        let mut current = Context::NULL;
        // SAFETY: contexts are valid for ever (primary, never released); each push has its pop.
        unsafe {
            self.driver.context_current(&raw mut current)?;
            if current == context {
                return work();
            }
            self.driver.context_push(context)?;
            let result = work();
            self.driver.context_pop(&raw mut current)?;
            result
        }
    }

    fn context(&self) -> Result<Context, Error> {
        if let Some(&context) = self.context.get() {
            return Ok(context);
        }
        let mut context = Context::NULL;
        // SAFETY: the result goes to a variable of its type. Two threads may both retain it: it is
        // the same, and is never released.
        unsafe {
            self.driver.primary_context(&raw mut context, self.handle)?;
        }
        Ok(*self.context.get_or_init(|| context))
    }
}
