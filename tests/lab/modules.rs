//! Kernel modules in the order in which they can be loaded.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use object::read::elf::ElfFile64;
use object::{Object, ObjectSection};

use crate::{At, Result};

/// The kernel takes `-` and `_` in a module's name for the same.
fn canonical(name: &str) -> String {
    name.replace('-', "_")
}

/// What a module says in its section `.modinfo` that it `depends=` on.
fn depends(module: &[u8]) -> Result<Vec<String>> {
    let elf = ElfFile64::<object::Endianness>::parse(module).at("ELF")?;
    let section = elf.section_by_name(".modinfo").ok_or("it has no .modinfo")?;
    let facts = section.data().at(".modinfo")?.split(|byte| *byte == 0);
    let mut names = facts.filter_map(|fact| fact.strip_prefix(b"depends="));
    let names = names.next().ok_or("its .modinfo has no depends=")?;
    let names = std::str::from_utf8(names).at("depends=")?;
    Ok(names.split(',').filter(|name| !name.is_empty()).map(canonical).collect())
}

/// All modules of a kernel.
pub struct Modules {
    files: BTreeMap<String, PathBuf>,
}

impl Modules {
    /// Those below `directory`.
    pub fn find(directory: &Path) -> Result<Self> {
        let mut files = BTreeMap::new();
        let mut directories = vec![directory.to_owned()];
        while let Some(directory) = directories.pop() {
            for entry in fs::read_dir(&directory).at(directory.display())? {
                let path = entry.at(directory.display())?.path();
                if path.is_dir() {
                    directories.push(path);
                } else if path.extension().is_some_and(|extension| extension == "ko") {
                    let name = path.file_stem().unwrap_or_default().to_string_lossy();
                    files.insert(canonical(&name), path);
                }
            }
        }
        Ok(Self { files })
    }

    /// These modules and those that they need, each after what it needs.
    pub fn ordered(&self, wanted: &[&str]) -> Result<Vec<PathBuf>> {
        let mut order = Vec::new();
        let needs = |name: &str| {
            let path = self.files.get(name).ok_or("the kernel has no such module")?;
            depends(&fs::read(path).at(path.display())?)
        };
        for name in wanted {
            visit(&canonical(name), &needs, &mut Vec::new(), &mut order)?;
        }
        Ok(order.iter().map(|name| self.files[name].clone()).collect())
    }
}

/// Puts a module behind what it needs; `above` is what led here.
fn visit(
    name: &str,
    needs: &impl Fn(&str) -> Result<Vec<String>>,
    above: &mut Vec<String>,
    order: &mut Vec<String>,
) -> Result<()> {
    if order.iter().any(|done| done == name) {
        return Ok(());
    }
    if above.iter().any(|one| one == name) {
        return Err(format!("module {name} depends on itself"));
    }
    above.push(name.to_owned());
    for needed in needs(name).at(format_args!("module {name}"))? {
        visit(&needed, needs, above, order)?;
    }
    above.pop();
    order.push(name.to_owned());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An ELF with a section `.modinfo` and its table of names.
    fn module(modinfo: &[u8]) -> Vec<u8> {
        let names = b"\0.modinfo\0.shstrtab\0";
        let (info_at, names_at) = (64, 64 + modinfo.len());
        let table_at = names_at + names.len();
        let mut elf = b"\x7fELF\x02\x01\x01".to_vec();
        elf.resize(16, 0);
        for half in [1u16, 62] {
            elf.extend(half.to_le_bytes());
        }
        elf.extend(1u32.to_le_bytes());
        for long in [0, 0, table_at as u64] {
            elf.extend(long.to_le_bytes());
        }
        elf.extend(0u32.to_le_bytes());
        for half in [64u16, 0, 0, 64, 3, 2] {
            elf.extend(half.to_le_bytes());
        }
        elf.extend(modinfo);
        elf.extend(names);
        let sections =
            [(0, 0, 0, 0), (1, 1, info_at, modinfo.len()), (10, 3, names_at, names.len())];
        for (name, kind, at, size) in sections {
            elf.extend((name as u32).to_le_bytes());
            elf.extend((kind as u32).to_le_bytes());
            for long in [0, 0, at as u64, size as u64] {
                elf.extend(long.to_le_bytes());
            }
            elf.extend([0; 8]);
            elf.extend([0; 16]);
        }
        elf
    }

    #[test]
    fn a_module_says_what_it_depends_on() {
        let info = module(b"license=GPL\0depends=virtio,virtio-ring\0retpoline=Y\0");
        assert_eq!(depends(&info).unwrap(), ["virtio", "virtio_ring"]);
        assert_eq!(depends(&module(b"license=GPL\0depends=\0")).unwrap(), [""; 0]);
    }

    #[test]
    fn what_is_no_module_is_refused() {
        assert!(depends(&module(b"license=GPL\0")).unwrap_err().contains("no depends="));
        let whole = module(b"depends=virtio\0");
        for length in 0..whole.len() {
            let _ = depends(&whole[..length]); // no panic
        }
        depends(b"#!/bin/sh").unwrap_err();
    }

    #[test]
    fn each_comes_after_what_it_needs_and_only_once() {
        let needs = |name: &str| {
            Ok(match name {
                "pci" => vec!["virtio".to_owned(), "ring".to_owned()],
                "virtio" => vec!["ring".to_owned()],
                "a" => vec!["b".to_owned()],
                "b" => vec!["a".to_owned()],
                _ => vec![],
            })
        };
        let mut order = Vec::new();
        visit("pci", &needs, &mut Vec::new(), &mut order).unwrap();
        visit("virtio", &needs, &mut Vec::new(), &mut order).unwrap();
        assert_eq!(order, ["ring", "virtio", "pci"]);
        assert!(visit("a", &needs, &mut Vec::new(), &mut order).unwrap_err().contains("itself"));
    }

    #[test]
    fn files_are_found_whichever_dash_their_names_have() {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("deep")).unwrap();
        fs::write(directory.path().join("deep/virtio-rng.ko"), module(b"depends=\0")).unwrap();
        let modules = Modules::find(directory.path()).unwrap();
        let order = modules.ordered(&["virtio_rng", "virtio-rng"]).unwrap();
        assert_eq!(order, [directory.path().join("deep/virtio-rng.ko")]);
        assert!(modules.ordered(&["e1000"]).unwrap_err().contains("no such module"));
    }
}
