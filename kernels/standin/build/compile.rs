//! Runs the C++ compiler over what has changed.

use super::scan;
use std::collections::VecDeque;
use std::env;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::time::SystemTime;

/// One object file.
pub struct Unit {
    pub stem: String,
    source: PathBuf,
    object: PathBuf,
    /// The folder of `cuda_host.h`, when the source is a `.cu` file.
    host: Option<PathBuf>,
}

impl Unit {
    /// A source of this crate.
    pub fn own(source: &Path, out: &Path) -> Self {
        Self::new("own", source, None, out)
    }

    /// A `.cu` file.
    pub fn kernels(source: &Path, host: &Path, out: &Path) -> Self {
        Self::new("cu", source, Some(host.to_path_buf()), out)
    }

    fn new(kind: &str, source: &Path, host: Option<PathBuf>, out: &Path) -> Self {
        let stem = source.file_stem().expect("a file").to_string_lossy().into_owned();
        let object = out.join(format!("{kind}_{stem}.o"));
        Self { stem, source: source.to_path_buf(), object, host }
    }

    /// Whether the object is there, made by `key`, and newer than all that it
    /// was made from.
    fn is_fresh(&self, key: &str) -> bool {
        let Ok(made) = fs::metadata(&self.object).and_then(|data| data.modified()) else {
            return false;
        };
        if fs::read_to_string(self.object.with_extension("key")).ok().as_deref() != Some(key) {
            return false;
        }
        let Ok(list) = fs::read_to_string(self.object.with_extension("d")) else {
            return false;
        };
        let is_older = |path: &str| {
            fs::metadata(path)
                .and_then(|data| data.modified())
                .is_ok_and(|time: SystemTime| time < made)
        };
        let list = list.replace("\\\n", " ");
        let generated = self.object.with_extension("cpp");
        list.split_once(": ").is_some_and(|(_, sources)| {
            sources.split_whitespace().all(|path| Path::new(path) == generated || is_older(path))
        })
    }
}

/// What is checked in the kernels while they run, beside `hooks.cpp`.
const UNDEFINED: &str =
    "alignment,bounds,shift-exponent,integer-divide-by-zero,float-cast-overflow";

pub struct Compiler {
    program: String,
    address_sanitizer: bool,
    /// Which of the sources' variants, as their PTX has: 75 or 80.
    arch: u32,
}

impl Compiler {
    /// `CXX`, or the first of the usual names that answers. None for targets
    /// that the stand-in does not know.
    pub fn find() -> Option<Self> {
        let target = env::var("TARGET").ok()?;
        let known = target.contains("linux")
            && (target.starts_with("x86_64") || target.starts_with("aarch64"))
            && env::var("HOST").ok()? == target;
        if !known {
            return None;
        }
        let wanted = env::var("CXX").ok().filter(|name| !name.is_empty());
        let names = match &wanted {
            Some(name) => vec![name.as_str()],
            None => vec!["c++", "g++", "clang++"],
        };
        let answers = |name: &str| {
            Command::new(name).arg("--version").output().is_ok_and(|output| output.status.success())
        };
        let program = names.into_iter().find(|name| answers(name))?.to_string();
        let sanitizer = env::var("PREGATE_STANDIN_SANITIZE").unwrap_or_default();
        assert!(
            sanitizer.is_empty() || sanitizer == "address",
            "PREGATE_STANDIN_SANITIZE is {sanitizer:?}; only \"address\" is known"
        );
        let arch = match env::var("PREGATE_STANDIN_ARCH").unwrap_or_default().as_str() {
            "" | "80" => 80,
            "75" => 75,
            other => panic!("PREGATE_STANDIN_ARCH is {other:?}; 75 and 80 are known"),
        };
        Some(Self { program, address_sanitizer: sanitizer == "address", arch })
    }

    /// Names the folder of what this compiler makes.
    pub fn variant(&self) -> String {
        let checks = if self.address_sanitizer { "address" } else { "checked" };
        format!("{checks}_{}", self.arch)
    }

    fn common_flags(&self) -> Vec<String> {
        let mut flags: Vec<&str> = vec![
            "-std=c++20",
            "-fPIC",
            "-g1",
            "-gdwarf-4",
            "-pthread",
            "-fvisibility=hidden",
            "-MMD",
        ];
        if self.address_sanitizer {
            flags.extend(["-fsanitize=address", "-fno-omit-frame-pointer"]);
        }
        let mut flags: Vec<String> = flags.into_iter().map(str::to_string).collect();
        flags.push(format!("-DPREGATE_STANDIN_ARCH={}", self.arch));
        flags
    }

    fn flags(&self, unit: &Unit) -> Vec<String> {
        let mut flags = self.common_flags();
        let Some(host) = &unit.host else {
            flags.extend(["-O2", "-Wall", "-Wextra"].map(str::to_string));
            return flags;
        };
        let exact =
            ["-O1", "-ffp-contract=off", "-fno-math-errno", "-fno-strict-aliasing", "-fwrapv"];
        flags.extend(exact.map(str::to_string));
        let checks = if self.address_sanitizer { String::new() } else { "thread,".to_string() };
        flags.push(format!("-fsanitize={checks}{UNDEFINED}"));
        flags.extend(["-w", "-DPREGATE_CU"].map(str::to_string));
        flags.push(format!("-I{}", host.display()));
        // `fmaf` and `rintf` in one instruction; the results are the same.
        #[cfg(target_arch = "x86_64")]
        if std::is_x86_feature_detected!("avx2") && std::is_x86_feature_detected!("fma") {
            flags.extend(["-mavx2", "-mfma"].map(str::to_string));
        }
        flags
    }

    /// Compiles what is not fresh and links all into a library whose name is
    /// the first that cudarc asks for.
    pub fn build(&self, units: &[Unit], out: &Path) -> PathBuf {
        let jobs = env::var("NUM_JOBS").ok().and_then(|text| text.parse().ok()).unwrap_or(1usize);
        let waiting: Mutex<VecDeque<&Unit>> = Mutex::new(units.iter().collect());
        let failures: Mutex<Vec<String>> = Mutex::new(Vec::new());
        std::thread::scope(|scope| {
            for _ in 0..jobs.clamp(1, 8) {
                scope.spawn(|| {
                    // A function, so that the lock ends before the work begins.
                    let next = || waiting.lock().expect("no panic while held").pop_front();
                    while let Some(unit) = next() {
                        if let Err(text) = self.compile(unit) {
                            failures.lock().expect("no panic while held").push(text);
                        }
                    }
                });
            }
        });
        let failures = failures.into_inner().expect("no panic while held");
        assert!(failures.is_empty(), "{}", failures.join("\n"));

        let library = out.join("libcuda.so");
        let mut link = Command::new(&self.program);
        link.args(["-shared", "-pthread", "-Wl,-soname,libcuda.so", "-o"]).arg(&library);
        if self.address_sanitizer {
            link.arg("-fsanitize=address");
        } else {
            link.arg("-Wl,-z,defs");
        }
        link.args(units.iter().map(|unit| &unit.object)).arg("-ldl");
        run(&mut link).unwrap_or_else(|text| panic!("{text}"));
        library
    }

    fn compile(&self, unit: &Unit) -> Result<(), String> {
        let flags = self.flags(unit);
        let key = format!("{} {} {}", self.program, flags.join(" "), unit.source.display());
        if unit.is_fresh(&key) {
            return Ok(());
        }
        let mut source = unit.source.clone();
        if let Some(host) = &unit.host {
            source = unit.object.with_extension("cpp");
            let text = self.registration(unit, host)?;
            fs::write(&source, text).map_err(|error| error.to_string())?;
        }
        let mut command = Command::new(&self.program);
        command.args(&flags).arg("-MF").arg(unit.object.with_extension("d"));
        command.arg("-c").arg(&source).arg("-o").arg(&unit.object);
        run(&mut command)?;
        fs::write(unit.object.with_extension("key"), key).map_err(|error| error.to_string())
    }

    /// A source that contains the `.cu` file and registers its kernels. The
    /// file stands in a namespace of its own, as a module does on a device.
    fn registration(&self, unit: &Unit, host: &Path) -> Result<String, String> {
        let mut scan = Command::new(&self.program);
        scan.args(["-E", "-P", "-x", "c++", "-std=c++20", "-DPREGATE_SCAN", "-DPREGATE_CU"]);
        scan.arg(format!("-DPREGATE_STANDIN_ARCH={}", self.arch));
        scan.arg(format!("-I{}", host.display()))
            .args(["-include", "cuda_host.h"])
            .arg(&unit.source);
        let kernels = scan::kernels(&run(&mut scan)?);
        let stem = &unit.stem;
        let mut text = format!(
            "#include \"cuda_host.h\"\nnamespace cu_{stem} {{\n#include \"{}\"\n",
            unit.source.display()
        );
        for kernel in &kernels {
            let limit = kernel.threads_limit.as_deref().unwrap_or("0");
            let _ =
                writeln!(text, "constexpr unsigned limit_of_{} = unsigned({limit});", kernel.name);
        }
        text.push_str("}\n");
        for kernel in &kernels {
            let name = &kernel.name;
            let _ = writeln!(
                text,
                "static const standin::Register<&cu_{stem}::{name}> kernel_{name}(\"{stem}\", \
                 \"{name}\", cu_{stem}::limit_of_{name});"
            );
        }
        Ok(text)
    }
}

fn run(command: &mut Command) -> Result<String, String> {
    let output = command.output().map_err(|error| format!("{command:?}: {error}"))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let errors = String::from_utf8_lossy(&output.stderr);
    Err(format!("{command:?}\n{}", errors.chars().take(8000).collect::<String>()))
}
