"""A toy of Debian's lists: sixty source packages in English and German, updates, and an apt-get that gives them."""

import bz2
import gzip
import hashlib
import lzma
import sys
from pathlib import Path

import lz4.frame

MAIN, UPDATES = "deb.example_debian_dists_toy_main", "deb.example_debian_dists_toy-updates_main"
PACK = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress, ".lz4": lz4.frame.compress}
WORDS = "apple bridge candle dragon engine forest garden hammer island jungle kettle ladder mirror needle orange"
GERMAN = "Apfel Brücke Kerze Drache Motor Wald Garten Hammer Insel Dschungel Kessel Leiter Spiegel Nadel Orange"


def md5(text):
    return hashlib.md5(text.encode()).hexdigest()


def paragraph(**fields):
    return "".join(f"{key.replace('_', '-')}: {value}\n" for key, value in fields.items()) + "\n"


def entry(i):
    """Package i: name, source, section, English description, German one."""
    a, b, c = (WORDS.split()[(i * k) % 15] for k in (1, 2, 4))
    x, y, z = (GERMAN.split()[(i * k) % 15] for k in (1, 2, 4))
    english = f"tool{i} for {a} and {b} number {i}\n The tool{i} program handles {a}, {b} and {c}.\n .\n More of {i}."
    german = f"Werkzeug {i} für {x} und {y}\n"
    german += f" Das Programm TOOL{i} bearbeitet {x}, {y} und {z} zum {i}. Mal in\n"
    german += f" Ruhe.\n .\n Mehr {i}."
    return f"tool{i}", f"src{i}", ("net", "games")[i % 2], english, german


def files(number=60):
    """Return {name without ending: text} of lists."""
    packages, english, german = "", "", ""
    for i in range(number):
        name, source, section, en, de = entry(i)
        about = {"Source": f"{source} (1.0)", "Section": f"main/{section}", "Tag": "a, b,\n c"}
        packages += paragraph(Package=name, Description_md5=md5(en), **about)
        english += paragraph(Package=name, Description_md5=md5(en), Description_en=en)
        german += paragraph(Package=name, Description_md5=md5(en), Description_de=de)
    name, source, section, en, de = entry(0)  # a second package of a source, and one that is nothing
    packages += paragraph(Package="tool0-doc", Source=source, Section="doc", Description_md5=md5(en))
    packages += paragraph(Package="old", Section="oldlibs", Description_md5=md5("old"))
    english += paragraph(Package="old", Description_md5=md5("old"), Description_en="transitional package for new\n Go.")
    german += paragraph(Package="old", Description_md5=md5("old"), Description_de="Übergangspaket\n " + "Leer. " * 20)
    new = entry(1)[3].replace("More", "News")
    updates = paragraph(Package="tool1", Source="src1", Section="net", Description_md5=md5(new))
    return {
        f"{MAIN}_binary-amd64_Packages": packages,
        f"{MAIN}_i18n_Translation-en": english,
        f"{MAIN}_i18n_Translation-de": german,
        f"{UPDATES}_binary-amd64_Packages": updates,
        f"{UPDATES}_i18n_Translation-en": paragraph(Package="tool1", Description_md5=md5(new), Description_en=new),
        "other.example_dists_x_main_binary-amd64_Packages": paragraph(
            Package="tool2", Section="evil", Description_md5=md5(entry(3)[3])
        ),
    }


def write(folder: Path, packed: str = ".lz4", number: int = 60) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files(number).items():
        (folder / f"{name}{packed}").write_bytes(PACK[packed](text.encode()))
    release = "".join(f" {'0' * 64} 7 main/i18n/Translation-{code}\n" for code in ("de", "en", "pt_BR"))
    (folder / f"{MAIN.removesuffix('_main')}_InRelease").write_text(release)
    return folder


def pretend(monkeypatch, tmp_path: Path, *, does: str = "", code: int = 0) -> Path:
    """Put an apt-get on the path that copies the toy's lists of the languages asked for; return its log of calls."""
    source, log, place = write(tmp_path / "server"), tmp_path / "calls", tmp_path / "bin"
    place.mkdir()
    program = place / "apt-get"
    program.write_text(f"""#!{sys.executable}
import pathlib, re, shutil, sys
conf = pathlib.Path(sys.argv[2]).read_text()
with open({str(log)!r}, "a") as f: f.write(" ".join(sys.argv[1:]) + "\\n" + conf)
lists = pathlib.Path(re.search(r'Dir::State::lists "(.*)"', conf)[1])
{does}
asked = re.findall(r'"(.*?)"', re.search(r"Acquire::Languages {{(.*)}};", conf)[1])
for p in pathlib.Path({str(source)!r}).iterdir():
    code = p.name.rpartition("Translation-")[2].partition(".")[0] if "i18n" in p.name else "en"
    if code in asked: shutil.copy(p, lists / p.name)
sys.exit({code})
""")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{place}")
    monkeypatch.setenv("ADDENDA_CACHE", str(tmp_path / "cache"))
    return log
