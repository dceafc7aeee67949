// Code images of fake_driver.c: which kernels a cubin or a PTX text has, and what each of them takes.
#include <elf.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MACHINE_CUDA = 190, INFO_REGISTERS = 0x2f, INFO_MAX_THREADS = 0x05, INFO_WORDS = 0x04 };

struct entry {
  char* name;
  unsigned registers, shared, max_threads;  // 0: not stated
};

struct image {
  int capability;  // 75, 90; that it was made for
  int is_ptx;
  unsigned count;
  struct entry* entries;
};

static struct entry* image_find(struct image* image, const char* name) {
  for (unsigned i = 0; i < image->count; ++i)
    if (!strcmp(image->entries[i].name, name)) return &image->entries[i];
  return NULL;
}

static struct entry* image_add(struct image* image, const char* name, size_t length) {
  image->entries = realloc(image->entries, (image->count + 1) * sizeof *image->entries);
  struct entry* made = &image->entries[image->count++];
  memset(made, 0, sizeof *made);
  made->name = strndup(name, length);
  return made;
}

static void image_free(struct image* image) {
  for (unsigned i = 0; i < image->count; ++i) free(image->entries[i].name);
  free(image->entries);
  memset(image, 0, sizeof *image);
}

// The attributes in a section .nv.info: `entry` for one of a kernel, null for that of all, whose
// values name the kernel by its symbol.
static void read_info(struct image* image, const unsigned char* at, size_t size,
                      const Elf64_Sym* symbols, const char* names, struct entry* entry) {
  for (size_t place = 0; place + 4 <= size;) {
    uint16_t length;
    memcpy(&length, at + place + 2, 2);
    const unsigned char form = at[place], kind = at[place + 1];
    place += 4;
    if (form != INFO_WORDS) continue;
    if (place + length > size) return;
    uint32_t words[3] = {0};
    memcpy(words, at + place, length < sizeof words ? length : sizeof words);
    if (entry && kind == INFO_MAX_THREADS) entry->max_threads = words[0] * words[1] * words[2];
    if (!entry && kind == INFO_REGISTERS) {
      struct entry* found = image_find(image, names + symbols[words[0]].st_name);
      if (found) found->registers = words[1];
    }
    place += length;
  }
}

static int read_cubin(struct image* image, const unsigned char* data) {
  const Elf64_Ehdr* header = (const Elf64_Ehdr*)data;
  if (header->e_ident[EI_CLASS] != ELFCLASS64 || header->e_machine != MACHINE_CUDA) return 0;
  // From ABI 8 on (CUDA 13) the architecture lies in the second byte of the flags.
  const unsigned flags = header->e_flags >> (header->e_ident[EI_ABIVERSION] >= 8 ? 8 : 0);
  image->capability = (int)(flags & 0xff);
  const Elf64_Shdr* sections = (const Elf64_Shdr*)(data + header->e_shoff);
  const char* texts = (const char*)data + sections[header->e_shstrndx].sh_offset;
  const Elf64_Sym* symbols = NULL;
  const char* names = NULL;
  size_t count = 0;
  unsigned reserved = 0;
  for (unsigned i = 0; i < header->e_shnum; ++i) {
    const char* name = texts + sections[i].sh_name;
    if (!strcmp(name, ".nv.shared.reserved.0")) reserved = 1024;
    if (sections[i].sh_type != SHT_SYMTAB) continue;
    symbols = (const Elf64_Sym*)(data + sections[i].sh_offset);
    names = (const char*)data + sections[sections[i].sh_link].sh_offset;
    count = sections[i].sh_size / sizeof *symbols;
  }
  const unsigned char entry_flag = 0x10;  // in st_other: what the host may call
  for (size_t i = 0; i < count; ++i)
    if (ELF64_ST_TYPE(symbols[i].st_info) == STT_FUNC && symbols[i].st_other & entry_flag)
      image_add(image, names + symbols[i].st_name, strlen(names + symbols[i].st_name));
  for (unsigned i = 0; i < header->e_shnum; ++i) {
    const char* name = texts + sections[i].sh_name;
    const unsigned char* content = data + sections[i].sh_offset;
    struct entry* entry = NULL;
    if (!strcmp(name, ".nv.info")) {
      read_info(image, content, sections[i].sh_size, symbols, names, NULL);
    } else if (!strncmp(name, ".nv.info.", 9) && (entry = image_find(image, name + 9))) {
      read_info(image, content, sections[i].sh_size, symbols, names, entry);
    } else if (!strncmp(name, ".nv.shared.", 11) && (entry = image_find(image, name + 11))) {
      const unsigned size = (unsigned)sections[i].sh_size;
      entry->shared = size > reserved ? size - reserved : 0;
    }
  }
  return 1;
}

static int read_ptx(struct image* image, const char* text) {
  const char* target = strstr(text, ".target");
  if (!strstr(text, ".version") || !target || sscanf(target, ".target sm_%d", &image->capability) != 1)
    return 0;
  image->is_ptx = 1;
  for (const char* at = text; (at = strstr(at, ".entry")); ) {
    at += strlen(".entry");
    at += strspn(at, " \t\n");
    image_add(image, at, strcspn(at, " \t\n("));
  }
  return 1;
}

// Reads an image that the caller gives no length of; 0 where it is neither.
static int image_read(struct image* image, const void* data) {
  memset(image, 0, sizeof *image);
  if (!memcmp(data, ELFMAG, SELFMAG)) return read_cubin(image, data);
  const char first = *(const char*)data;
  return (first == '.' || first == '/' || first == '\n') && read_ptx(image, data);
}
